# SPDX-License-Identifier: Apache-2.0
"""The optional patches fit the installed SGLang, on copies: the package is never changed."""

import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

PATCHES = sorted(Path(__file__).parents[2].glob(f"patches/sglang-{version('sglang')}/*.patch"))


def patch(folder: Path, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["patch", "-p1", "--force", "--fuzz=0", f"--input={path}", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_patch_loads_plugins_before_it_parses(path: Path, tmp_path: Path) -> None:
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    (target,) = re.findall(r"^\+\+\+ b/(\S+)$", path.read_text(), re.MULTILINE)
    copy = tmp_path / target
    copy.parent.mkdir()
    shutil.copyfile(Path(spec.submodule_search_locations[0]) / target, copy)
    before = copy.read_text()
    if patch(tmp_path, path, "--reverse", "--dry-run").returncode == 0:  # this SGLang is patched
        patch(tmp_path, path, "--reverse")
        before = copy.read_text()
    done = patch(tmp_path, path)
    assert done.returncode == 0 and "offset" not in done.stdout, done.stdout
    after = copy.read_text()
    compile(after, target, "exec")
    function = after[re.search(r"^def (cli_main|serve)\(", after, re.MULTILINE).start() :]  # type: ignore[union-attr]
    parses = re.search(r'ArgumentParser\(|"--help"', function)
    assert parses is not None and function.index("load_plugins()") < parses.start()
    patch(tmp_path, path, "--reverse")
    assert copy.read_text() == before


def test_there_are_patches_of_this_version() -> None:
    assert {path.stem for path in PATCHES} == {
        "serve-help",
        "offline-throughput",
        "one-batch-server",
    }
