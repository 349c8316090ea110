# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what every file of the project looks like."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lava_sglang.methods import METHODS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lava_sglang"

# tools -> integration -> managers, attention -> mem_cache, policy -> kernels, config, methods
RANKS = {
    "tools": 4,
    "integration": 3,
    "managers": 2,
    "attention": 2,
    "mem_cache": 1,
    "policy": 1,
    "kernels": 0,
    "config": 0,
    "layer_map": 0,
    "methods": 0,
    "metrics": 0,
    "frontend": 0,
    "cpu_platform": 0,
}
# The lifecycle reads the window that attention filled; the memory plan counts by the policy's
# settings; the settings ask the table what a method takes, and the map what layers keep.
WITHIN_A_RANK = {("managers", "attention"), ("config", "methods"), ("config", "layer_map")}
WITHOUT_SGLANG = ("kernels", "policy", "config", "layer_map", "methods")
KERNEL_IMPORTS = {"torch", "triton", "lava_sglang"}
CPU_KERNEL_IMPORTS = {"numba", "llvmlite", "numpy"}  # SGLang depends on numba
METHOD_FILES = {traits.path.partition(":")[0].rpartition(".")[2] for traits in METHODS.values()}
SPDX = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 500
CATCH_ALL_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}
# Joined, so that this file does not match itself.
MACHINE_PATHS = re.compile(
    "|".join(f"(?<![\\w.:-])/{root}/" for root in ("work", "tmp", "home", "Users", "mnt"))
)


def project_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.splitlines())
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def names(paths: list[Path]) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


FILES = project_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]


def modules_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.glob("**/*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


class ImportFinder(ast.NodeVisitor):
    """Full names of everything a file imports, also in functions; not for type checkers only."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0 and node.module is not None, "relative import"
        self.found.update(f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(source: str) -> set[str]:
    finder = ImportFinder()
    finder.visit(ast.parse(source))
    return finder.found


def imports_in(path: Path) -> set[str]:
    return imports_of(path.read_text())


def parts_imported(path: Path) -> Iterator[str]:
    for name in imports_in(path):
        package, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if package == "lava_sglang" and part in RANKS:
            yield part


def package_modules() -> list[Path]:
    """Every module of the package, not those of the symlinks' folders."""
    return [
        path for path in PYTHON_FILES if path.is_relative_to(PACKAGE) and path.name != "__init__.py"
    ]


def test_every_module_has_a_rank_and_a_place_on_the_map() -> None:
    page = (PACKAGE / "README.md").read_text()
    tree = page.partition("```\n")[2].partition("```")[0]
    for path in package_modules():
        name = path.relative_to(PACKAGE)
        assert name.parts[0].removesuffix(".py") in RANKS, name
        folder = f"{name.parts[0]}/" if len(name.parts) > 1 else ""
        # A method's file, and what belongs to a tool, go by their folder.
        if name.parts[0] == "tools" and len(name.parts) > 2:
            assert f"{name.parts[1]}/" in tree, name
        elif not (name.parts[0] == "policy" and name.stem in METHOD_FILES):
            assert folder in tree and path.name in tree, name


def test_the_finder_sees_every_form() -> None:
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import no\nelse:\n    import e\n"
        "def f():\n    from g.h import i\n"
    )
    assert imports_of(source) == {"a.b", "c.d", "e", "g.h.i"}


@pytest.mark.parametrize("part", RANKS)
def test_imports_point_down(part: str) -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in modules_of(part)
        for imported in parts_imported(path)
        if imported != part
        and RANKS[imported] >= RANKS[part]
        and (part, imported) not in WITHIN_A_RANK
    ]
    assert modules_of(part) and upward == []


@pytest.mark.parametrize("part", WITHOUT_SGLANG)
def test_the_core_does_not_import_sglang(part: str) -> None:
    for path in modules_of(part):
        roots = {name.partition(".")[0] for name in imports_in(path)}
        assert "sglang" not in roots, path


def test_kernels_import_torch_triton_and_the_standard_library() -> None:
    for path in modules_of("kernels"):
        for name in imports_in(path):
            root = name.partition(".")[0]
            if "cpu" in path.parts and root in CPU_KERNEL_IMPORTS:
                continue
            assert root in KERNEL_IMPORTS or root in sys.stdlib_module_names, (path, name)
            assert root != "lava_sglang" or name.startswith("lava_sglang.kernels"), (path, name)


def test_nothing_imports_kernels_by_its_root_name() -> None:
    for path in PYTHON_FILES:
        if path == Path(__file__).with_name("test_packaging.py"):
            continue  # shows that it is refused
        assert not {n for n in imports_in(path) if n.partition(".")[0] == "kernels"}, path


def test_the_light_modules_load_without_torch_and_sglang() -> None:
    """What the launcher and `lava-sglang --help` import before anything is decided."""
    source = (
        "import sys\n"
        "import lava_sglang, lava_sglang.config\n"
        "import lava_sglang.integration.seams, lava_sglang.integration.refusals\n"
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_files_are_short() -> None:
    long = [path for path in PYTHON_FILES if len(path.read_text().splitlines()) > MAX_LINES]
    # numba's disk cache watches one file, so all that is compiled together is in one.
    assert names(long) in ([], ["kernels/cpu/ragged_decode_jit.py"])


def test_files_start_with_their_licence() -> None:
    bare = [path for path in PYTHON_FILES if not path.read_text().startswith(SPDX)]
    assert names(bare) == []


def test_no_file_is_named_for_nothing() -> None:
    assert names([path for path in FILES if path.name in CATCH_ALL_NAMES]) == []


def test_no_file_names_a_machine() -> None:
    assert MACHINE_PATHS.search("cd " + "/".join(["", "work", "main"]))
    assert MACHINE_PATHS.search('"' + "/".join(["", "tmp", "x"]) + '"')
    assert not MACHINE_PATHS.search("https://example.org" + "/".join(["", "home", "x"]))
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in FILES
        for line in path.read_bytes().decode(errors="replace").splitlines()
        if MACHINE_PATHS.search(line)
    ]
    assert found == []
