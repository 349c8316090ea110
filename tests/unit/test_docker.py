# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles, read as text, and docker/install.sh, run with a stand-in for pip."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "docker" / "install.sh"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
(SGLANG_PIN,) = EXTRAS["sglang"]
SGLANG_VERSION = SGLANG_PIN.removeprefix("sglang==")

each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), comments dropped and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line]


def arguments(path: Path, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == instruction]


def install_arguments(path: Path) -> list[str]:
    (run,) = [run for run in arguments(path, "RUN") if "install.sh" in run]
    return run.partition("docker/install.sh ")[2].split()


def test_both_images_are_here() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@each_dockerfile
def test_instructions_are_known(path: Path) -> None:
    names = [name for name, _ in instructions(path)]
    assert set(names) <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "EXPOSE", "CMD"}
    assert next(name for name in names if name != "ARG") == "FROM"


@each_dockerfile
def test_copied_files_exist_and_keep_their_place(path: Path) -> None:
    copied = []
    for rest in arguments(path, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert target in ("./", source)
            copied.append(source)
    # The links lava_sglang/kernels and lava_sglang/patches need the folders they point to.
    assert {"pyproject.toml", "lava_sglang", "kernels", "patches", "docker/install.sh"} <= {*copied}
    assert PROJECT["readme"] in copied
    assert set(PROJECT["license-files"]) <= {*copied}


@each_dockerfile
def test_install_script_is_the_only_way_to_install(path: Path) -> None:
    runs = arguments(path, "RUN")
    assert not [run for run in runs if re.search(r"\bpip3? install\b|\buv pip\b", run)]
    before = instructions(path).index(("COPY", "docker/install.sh docker/install.sh"))
    (run,) = [run for run in runs if "docker/install.sh" in run]
    assert instructions(path).index(("RUN", run)) > before


def test_cuda_image_is_the_pinned_sglang() -> None:
    path = ROOT / "docker" / "cuda.Dockerfile"
    assert arguments(path, "ARG") == [f"SGLANG_IMAGE=lmsysorg/sglang:v{SGLANG_VERSION}"]
    assert arguments(path, "FROM") == ["${SGLANG_IMAGE}"]
    assert install_arguments(path) == ["--into", "python3"]


def test_cpu_image_installs_the_pinned_sglang() -> None:
    path = ROOT / "docker" / "cpu.Dockerfile"
    (base,) = arguments(path, "FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim-bookworm", base)
    minimum = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert version and minimum
    assert int(version[1]) >= int(minimum[1])
    venv, extras = install_arguments(path)
    assert {"sglang", "test"} <= {*extras.split(",")} <= {*EXTRAS}
    assert f"PATH={venv}/bin:$PATH" in arguments(path, "ENV")


def test_makefile_uses_the_install_script() -> None:
    assert "docker/install.sh" in (ROOT / "Makefile").read_text()


def test_install_script_asks_for_the_python_of_the_project() -> None:
    wanted = PROJECT["requires-python"]
    assert f"Requires-Python {wanted}" in INSTALL.read_text()
    major, minor = wanted.removeprefix(">=").split(".")
    assert f"sys.version_info < ({major}, {minor})" in INSTALL.read_text()


def test_install_script_is_executable_bash() -> None:
    assert os.access(INSTALL, os.X_OK)
    checked = subprocess.run(["bash", "-n", INSTALL], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@dataclass
class Checkout:
    """A copy of what install.sh reads, and a `python3.11` that logs in place of doing."""

    root: Path
    metadata: Path

    def declare(self, name: str, version: str, entry_points: str = "") -> None:
        """Make `name` look installed."""
        folder = self.metadata / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(entry_points)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(self.metadata),
            "LOG": str(self.root / "log"),
        }
        return subprocess.run(
            [str(self.root / "docker" / "install.sh"), *arguments],
            env=paths | environment,
            cwd=self.root,
            capture_output=True,
            text=True,
        )

    def log(self) -> list[str]:
        """What python was asked to do since the last call: `venv DIR` or `pip install ...`."""
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


STAND_IN = f"""#!/bin/bash
case "$1 $2 $3" in
"-m venv "*) echo "venv $3" >> "$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip --version") ;;
"-m pip install") echo "${{*:2}}" >> "$LOG"; exit "${{PIP_STATUS:-0}}" ;;
*) exec {sys.executable} -S "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "checkout"
    for folder in ("docker", "bin"):
        (root / folder).mkdir(parents=True)
    (root / "docker" / "install.sh").write_text(INSTALL.read_text())
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (root / "bin" / "python3.11").write_text(STAND_IN)
    for script in ("docker/install.sh", "bin/python3.11"):
        (root / script).chmod(0o755)
    checkout = Checkout(root, tmp_path / "metadata")
    checkout.declare(
        "lava-sglang", "1", "[sglang.srt.plugins]\nlava = lava_sglang.integration.plugin:register"
    )
    return checkout


def test_virtual_environment_is_made_once(checkout: Checkout) -> None:
    first = checkout.run("venv", "sglang,test")
    assert first.returncode == 0, first.stderr
    install = f"pip install --editable {checkout.root}[sglang,test]"
    assert checkout.log() == ["venv venv", install]

    again = checkout.run("venv", "sglang,test")
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stdout
    assert checkout.log() == []

    assert checkout.run("venv", "sglang").returncode == 0
    assert checkout.log() == [f"pip install --editable {checkout.root}[sglang]"]
    assert checkout.run("venv").returncode == 0
    assert checkout.log() == [install]

    pyproject = checkout.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text() + "\n# changed\n")
    assert checkout.run("venv").returncode == 0
    assert checkout.log() == [install]


def test_failed_install_is_tried_again(checkout: Checkout) -> None:
    assert checkout.run("venv").returncode == 0
    failed = checkout.run("venv", "test", PIP_STATUS="7")
    assert failed.returncode == 7
    checkout.log()
    assert checkout.run("venv").returncode == 0
    assert checkout.log() == [f"pip install --editable {checkout.root}[sglang,test]"]


def test_old_python_is_refused(checkout: Checkout) -> None:
    for name in ("python3.11", "python3"):
        stand_in = checkout.root / "bin" / name
        stand_in.write_text("#!/bin/bash\nexit 1\n")
        stand_in.chmod(0o755)
    refused = checkout.run("venv")
    assert refused.returncode == 1
    assert "found no Python >= 3.11" in refused.stderr
    refused = checkout.run("venv", PYTHON="python3.10")
    assert "looked for python3.10" in refused.stderr
    refused = checkout.run("--into", "python3.11")
    assert "python3.11: not a Python >= 3.11" in refused.stderr
    assert not (checkout.root / "venv").exists()


def test_install_beside_sglang_keeps_it(checkout: Checkout) -> None:
    checkout.declare("sglang", SGLANG_VERSION)
    done = checkout.run("--into", "python3.11")
    assert done.returncode == 0, done.stderr
    assert checkout.log() == [f"pip install {checkout.root}"]
    assert checkout.run("--into", "python3.11", "test").returncode == 0
    assert checkout.log() == [f"pip install {checkout.root}[test]"]


@pytest.mark.parametrize(("version", "found"), [("0.5.22", "sglang==0.5.22"), (None, "no sglang")])
def test_install_beside_another_sglang_is_refused(
    checkout: Checkout, version: str | None, found: str
) -> None:
    if version:
        checkout.declare("sglang", version)
    refused = checkout.run("--into", "python3.11")
    assert refused.returncode == 1
    assert f"has {found}; the plugin accepts {SGLANG_PIN}" in refused.stderr
    assert checkout.log() == []


def test_plugin_that_sglang_cannot_find_is_an_error(checkout: Checkout) -> None:
    (entry_points,) = checkout.metadata.glob("lava_sglang-*/entry_points.txt")
    entry_points.write_text("")
    failed = checkout.run("venv")
    assert failed.returncode == 1
    assert "would not find the plugin" in failed.stderr


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--into",)])
def test_usage(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    refused = checkout.run(*arguments)
    assert refused.returncode != 0
    assert "usage: docker/install.sh" in refused.stderr
