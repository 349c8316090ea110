# SPDX-License-Identifier: Apache-2.0
"""What an installed lava-sglang holds: one copy of the kernels, its data, its entry points."""

import importlib
import importlib.metadata
import importlib.resources
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lava_sglang
from lava_sglang.integration.refusals import SGLANG_VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = importlib.metadata.distribution("lava-sglang")


def test_kernels_are_a_part_of_the_package() -> None:
    module = importlib.import_module("lava_sglang.kernels.reference")
    assert module.__name__ == "lava_sglang.kernels.reference"
    assert (ROOT / "lava_sglang" / "kernels").resolve() == ROOT / "kernels"


def test_kernels_by_their_root_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"lava_sglang\.kernels"):
        importlib.import_module("kernels.reference")


def test_every_data_file_is_matched_by_the_package_data() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["lava_sglang"]
    package = ROOT / "lava_sglang"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    patches = package / "patches"
    series = [*(patches / f"sglang-{SGLANG_VERSION}").iterdir(), patches / "README.md"]
    assert {package / "py.typed", *series} <= packed


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("sglang.srt.plugins", "lava", "lava_sglang.integration.plugin:register"),
        ("sglang.srt.platforms", "lava_cpu", "lava_sglang.cpu_platform.platform:activate"),
        ("console_scripts", "lava-sglang", "lava_sglang.tools.cli:main"),
    ],
)
def test_entry_points_are_installed_and_name_a_function(group: str, name: str, value: str) -> None:
    found = [e for e in DISTRIBUTION.entry_points if e.group == group and e.name == name]
    assert [entry.value for entry in found] == [value]
    module, _, attribute = value.partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.is_file() and f"def {attribute}(" in path.read_text()


def test_installed_entry_points_are_the_declared_ones() -> None:
    declared = {
        (group, name): value
        for group, entries in {
            **PROJECT["entry-points"],
            "console_scripts": PROJECT["scripts"],
        }.items()
        for name, value in entries.items()
    }
    assert {(e.group, e.name): e.value for e in DISTRIBUTION.entry_points} == declared


def test_the_extra_pins_the_sglang_we_verify() -> None:
    (requirement,) = map(Requirement, PROJECT["optional-dependencies"]["sglang"])
    assert requirement.name == "sglang"
    assert str(requirement.specifier) == f"=={SGLANG_VERSION}"


def test_the_version_is_told_once() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert DISTRIBUTION.version == lava_sglang.__version__


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("lava_sglang").joinpath("py.typed").is_file()
