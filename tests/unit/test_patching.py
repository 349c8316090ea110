# SPDX-License-Identifier: Apache-2.0
"""The optional patches: what each must say, and that applying is exact and all or nothing."""

import argparse
import difflib
import hashlib
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from lava_sglang.tools import patching
from lava_sglang.tools.patching import PatchError, PatchSeries, PatchState, SGLangInstall

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "patches").glob("sglang-*"))
PATCHES = [
    pytest.param(folder, patch, id=f"{folder.name}/{patch['file']}")
    for folder in FOLDERS
    for patch in tomllib.loads((folder / "series.toml").read_text())["patch"]
]

Action = Callable[[PatchSeries, SGLangInstall], list[Path]]

VERSION = "9.9"
PRISTINE = {
    "cli/serve.py": "import os\n\n\ndef serve():\n    help()\n    load()\n    run()\n",
    "bench.py": "\n".join(f"line {n}" for n in range(40)) + "\n",
}
PATCHED = {
    "cli/serve.py": "import os\n\n\ndef serve():\n    load()\n    help()\n    run()\n",
    "bench.py": PRISTINE["bench.py"].replace("line 3\n", "").replace("line 30", "a\nb\nline 30"),
}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def unified_diff(target: str, old: str, new: str) -> str:
    return "".join(
        difflib.unified_diff(
            old.splitlines(True), new.splitlines(True), f"a/{target}", f"b/{target}"
        )
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A patches folder with one series that turns PRISTINE into PATCHED."""
    folder = tmp_path / "patches" / f"sglang-{VERSION}"
    folder.mkdir(parents=True)
    entries = [f'sglang_version = "{VERSION}"']
    for target, old in PRISTINE.items():
        file = target.replace("/", "-").replace(".py", ".patch")
        (folder / file).write_text("why\n\n" + unified_diff(target, old, PATCHED[target]))
        entries.append(
            f'[[patch]]\nfile = "{file}"\ntarget = "{target}"\n'
            f'target_sha256 = "{sha256(old)}"\npatched_sha256 = "{sha256(PATCHED[target])}"\n'
            'why = "why"\nwhy_not_a_hook = "no hook"\nupstream = "link"\nremove_when = "fixed"\n'
        )
    (folder / "series.toml").write_text("\n".join(entries))
    return folder.parent


@pytest.fixture
def series(root: Path) -> PatchSeries:
    return PatchSeries.load(VERSION, root)


@pytest.fixture
def install(tmp_path: Path) -> SGLangInstall:
    package = tmp_path / "sglang"
    for target, text in PRISTINE.items():
        (package / target).parent.mkdir(parents=True, exist_ok=True)
        (package / target).write_text(text)
    return SGLangInstall(package, VERSION)


def tree(install: SGLangInstall) -> dict[str, str]:
    """Every file of the package, so that a leftover temporary file shows too."""
    return {
        str(path.relative_to(install.package_dir)): path.read_text()
        for path in install.package_dir.rglob("*")
        if path.is_file()
    }


def states(series: PatchSeries, install: SGLangInstall) -> set[PatchState]:
    return {entry.state for entry in patching.status(series, install)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_holds_one_valid_series(folder: Path) -> None:
    series = PatchSeries.load(folder.name.removeprefix("sglang-"))
    assert f"sglang-{series.sglang_version}" == folder.name
    files = [patch.file for patch in series.patch]
    targets = [patch.target for patch in series.patch]
    assert sorted(files) == sorted(path.name for path in folder.glob("*.patch"))
    assert len(set(files)) == len(files)
    assert len(set(targets)) == len(targets)


def test_there_is_a_series() -> None:
    assert FOLDERS


@pytest.mark.parametrize(("folder", "patch"), PATCHES)
def test_patch_says_why_and_stays_small(folder: Path, patch: dict[str, str]) -> None:
    preamble, mark, body = (folder / patch["file"]).read_text().partition("--- ")
    assert mark, "no diff"
    assert preamble.strip() == patch["why"]
    target = patch["target"]
    assert body.startswith(f"a/{target}\n+++ b/{target}\n@@ ")
    changed = [line for line in body.splitlines()[2:] if line[:1] in "+-"]
    assert 0 < len(changed) < 30
    assert patch["target_sha256"] != patch["patched_sha256"]
    assert "https://github.com/sgl-project/sglang/" in patch["upstream"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "../serve.patch"),
        ("target", "../../os.py"),
        ("target", "/etc/os.py"),
        ("target_sha256", "0" * 63),
        ("patched_sha256", "unknown"),
        ("why", " "),
        ("why_not_a_hook", ""),
        ("upstream", ""),
        ("remove_when", None),
        ("surprise", "field"),
    ],
)
def test_malformed_entry_is_refused(root: Path, field: str, value: str | None) -> None:
    path = root / f"sglang-{VERSION}" / "series.toml"
    entry = tomllib.loads(path.read_text())["patch"][0] | {field: value}
    lines = [f'{name} = "{text}"' for name, text in entry.items() if text is not None]
    path.write_text(f'sglang_version = "{VERSION}"\n[[patch]]\n' + "\n".join(lines))
    with pytest.raises(ValidationError, match=field):
        PatchSeries.load(VERSION, root)


def test_unknown_version_is_refused(root: Path) -> None:
    with pytest.raises(PatchError, match=r"SGLang 1\.0.*sglang-9\.9"):
        PatchSeries.load("1.0", root)


def test_apply_and_revert_round_trip(series: PatchSeries, install: SGLangInstall) -> None:
    (install.package_dir / "cli/serve.py").chmod(0o640)
    assert states(series, install) == {PatchState.PRISTINE}
    assert patching.revert(series, install) == []

    targets = [install.package_dir / target for target in PRISTINE]
    assert patching.apply(series, install) == targets
    assert tree(install) == PATCHED
    assert states(series, install) == {PatchState.APPLIED}
    assert patching.apply(series, install) == []

    assert patching.revert(series, install) == targets
    assert tree(install) == PRISTINE
    assert (install.package_dir / "cli/serve.py").stat().st_mode & 0o777 == 0o640


def test_hard_linked_file_elsewhere_is_not_touched(
    series: PatchSeries, install: SGLangInstall, tmp_path: Path
) -> None:
    """Installers may hard-link package files out of a shared cache."""
    cached = tmp_path / "cached.py"
    cached.hardlink_to(install.package_dir / "bench.py")
    patching.apply(series, install)
    assert cached.read_text() == PRISTINE["bench.py"]


@pytest.mark.parametrize("action", [patching.apply, patching.revert])
@pytest.mark.parametrize("target", PRISTINE)
def test_one_changed_file_refuses_all(
    action: Action, target: str, series: PatchSeries, install: SGLangInstall
) -> None:
    (install.package_dir / target).write_text("edited\n")
    before = tree(install)
    with pytest.raises(PatchError) as refusal:
        action(series, install)
    assert tree(install) == before
    message = str(refusal.value)
    assert str(install.package_dir / target) in message
    assert f"found sha256 {sha256('edited' + chr(10))}" in message
    wanted = PRISTINE if action is patching.apply else PATCHED
    assert f"expected {sha256(wanted[target])}" in message
    assert f"sglang {VERSION}" in message


@pytest.mark.parametrize("action", [patching.apply, patching.revert])
def test_missing_file_refuses_all(
    action: Action, series: PatchSeries, install: SGLangInstall
) -> None:
    (install.package_dir / "bench.py").unlink()
    before = tree(install)
    with pytest.raises(PatchError, match=r"bench\.py.*missing"):
        action(series, install)
    assert tree(install) == before


@pytest.mark.parametrize("action", [patching.apply, patching.revert])
def test_partly_patched_package_is_refused(
    action: Action, series: PatchSeries, install: SGLangInstall
) -> None:
    (install.package_dir / "bench.py").write_text(PATCHED["bench.py"])
    before = tree(install)
    with pytest.raises(PatchError, match="--force-reinstall"):
        action(series, install)
    assert tree(install) == before


@pytest.mark.parametrize("action", [patching.apply, patching.revert])
def test_other_version_is_refused(
    action: Action, series: PatchSeries, install: SGLangInstall
) -> None:
    other = SGLangInstall(install.package_dir, "9.8")
    with pytest.raises(PatchError, match=r"sglang 9\.8 is installed.*accept 9\.9"):
        action(series, other)
    assert tree(install) == PRISTINE


def test_wrong_result_is_refused(root: Path, install: SGLangInstall) -> None:
    path = root / f"sglang-{VERSION}" / "bench.patch"
    path.write_text(path.read_text().replace("+a\n", "+c\n"))
    with pytest.raises(PatchError, match=r"bench\.patch.*not sha256"):
        patching.apply(PatchSeries.load(VERSION, root), install)
    assert tree(install) == PRISTINE


def test_full_disk_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, series: PatchSeries, install: SGLangInstall
) -> None:
    def fail_on_the_second_file(path: Path, content: bytes) -> Path:
        if path.name == "bench.py":
            raise OSError("No space left on device")
        return stage(path, content)

    stage = patching._stage
    monkeypatch.setattr(patching, "_stage", fail_on_the_second_file)
    with pytest.raises(OSError, match="No space"):
        patching.apply(series, install)
    assert tree(install) == PRISTINE


@pytest.mark.parametrize("target", PRISTINE)
def test_apply_diff_wants_exact_lines(target: str) -> None:
    old, new = PRISTINE[target], PATCHED[target]
    diff = unified_diff(target, old, new).encode()
    assert patching.apply_diff(old.encode(), diff) == new.encode()
    assert patching.apply_diff(new.encode(), diff, reverse=True) == old.encode()
    for other in ("\n" + old, old.replace("    ", "  ").replace("line 4", "line four")):
        with pytest.raises(ValueError, match="does not match"):
            patching.apply_diff(other.encode(), diff)


def test_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    series: PatchSeries,
    install: SGLangInstall,
) -> None:
    parser = argparse.ArgumentParser()
    patching.add_patch_command(parser.add_subparsers())
    monkeypatch.setattr(SGLangInstall, "find", classmethod(lambda cls: install))
    monkeypatch.setattr(PatchSeries, "load", classmethod(lambda cls, version: series))

    def run(action: str) -> int:
        args = parser.parse_args(["patch", action])
        return args.run(args)

    assert run("check") == 0
    assert "not applied" in capsys.readouterr().out
    assert run("apply") == 0
    assert "2 files changed" in capsys.readouterr().out
    assert tree(install) == PATCHED
    assert run("check") == 0
    assert run("revert") == 0
    assert tree(install) == PRISTINE

    shutil.copyfile(install.package_dir / "cli/serve.py", install.package_dir / "bench.py")
    assert run("check") == 1
    assert run("apply") == 1
    assert "bench.py (sglang 9.9): changed by something else" in capsys.readouterr().err


def test_command_line_names_an_unsupported_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], install: SGLangInstall
) -> None:
    other = SGLangInstall(install.package_dir, "1.0")
    monkeypatch.setattr(SGLangInstall, "find", classmethod(lambda cls: other))
    assert patching.run_patch(argparse.Namespace(action="check")) == 1
    assert "SGLang 1.0: no patches for this version" in capsys.readouterr().err
