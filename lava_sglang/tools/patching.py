# SPDX-License-Identifier: Apache-2.0
"""The optional source patches of an installed SGLang: read, check, apply, revert."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from rich.console import Console
from rich.table import Table

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Sentence = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

_HUNK_HEADER = re.compile(rb"^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@.*\n", re.MULTILINE)


class PatchError(RuntimeError):
    """The patches cannot be applied or reverted. `reasons` holds one sentence each."""

    def __init__(self, reasons: list[str]):
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Patch(BaseModel):
    """One `[[patch]]` of series.toml: one file of SGLang's package, before and after."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+\.patch$")]
    # Below the sglang package directory.
    target: Annotated[str, StringConstraints(pattern=r"^(\w+/)*\w+\.py$")]
    target_sha256: Sha256
    patched_sha256: Sha256
    why: Sentence
    why_not_a_hook: Sentence
    upstream: Sentence
    remove_when: Sentence


class PatchSeries(BaseModel):
    """The patches for one SGLang version, applied together or not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sglang_version: str
    patch: tuple[Patch, ...] = Field(min_length=1)
    folder: Traversable

    @classmethod
    def load(cls, sglang_version: str, root: Traversable | None = None) -> PatchSeries:
        """The series below `root` (default: the packaged one) for `sglang_version`.

        Raises PatchError if there is none, pydantic.ValidationError if an entry is malformed.
        """
        root = root or importlib.resources.files("lava_sglang").joinpath("patches")
        folder = root.joinpath(f"sglang-{sglang_version}")
        if not folder.is_dir():
            known = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            raise PatchError(
                [f"SGLang {sglang_version}: no patches for this version, only {', '.join(known)}"]
            )
        fields = tomllib.loads(folder.joinpath("series.toml").read_text(encoding="utf-8"))
        return cls.model_validate({**fields, "folder": folder})

    def diff(self, patch: Patch) -> bytes:
        """The unified diff of `patch`."""
        return self.folder.joinpath(patch.file).read_bytes()


@dataclass(frozen=True)
class SGLangInstall:
    """Where SGLang's package lies and which version it is."""

    package_dir: Path
    version: str

    @classmethod
    def find(cls) -> SGLangInstall:
        """The installed SGLang, found without importing it; raises PatchError if there is none."""
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise PatchError(["sglang: not installed in this Python environment"])
        return cls(Path(spec.submodule_search_locations[0]), importlib.metadata.version("sglang"))


class PatchState(Enum):
    PRISTINE = "not applied"
    APPLIED = "applied"
    CHANGED = "changed by something else"
    MISSING = "missing"


@dataclass(frozen=True)
class PatchStatus:
    """A patch and the file that it targets as found; `found_sha256` is None for no file."""

    patch: Patch
    path: Path
    found_sha256: str | None

    @property
    def state(self) -> PatchState:
        if self.found_sha256 is None:
            return PatchState.MISSING
        return {
            self.patch.target_sha256: PatchState.PRISTINE,
            self.patch.patched_sha256: PatchState.APPLIED,
        }.get(self.found_sha256, PatchState.CHANGED)


def status(series: PatchSeries, install: SGLangInstall) -> list[PatchStatus]:
    """How each target of `series` was found; changes nothing."""
    statuses = []
    for patch in series.patch:
        path = install.package_dir / patch.target
        found = _sha256(path.read_bytes()) if path.is_file() else None
        statuses.append(PatchStatus(patch, path, found))
    return statuses


def apply(series: PatchSeries, install: SGLangInstall) -> list[Path]:
    """Patch every target and return the files changed: none if all were patched already.

    Raises PatchError, with nothing changed, unless every target is as SGLang released it.
    """
    return _rewrite(series, install, PatchState.PRISTINE, PatchState.APPLIED)


def revert(series: PatchSeries, install: SGLangInstall) -> list[Path]:
    """Restore every target and return the files changed: none if all were pristine already.

    Raises PatchError, with nothing changed, unless every target is as `apply` left it.
    """
    return _rewrite(series, install, PatchState.APPLIED, PatchState.PRISTINE)


def apply_diff(original: bytes, diff: bytes, reverse: bool = False) -> bytes:
    """`original` with the hunks of a one-file unified diff; ValueError if a line differs."""
    lines, result, position = original.split(b"\n"), list[bytes](), 0
    for start, old, new in _hunks(diff, reverse):
        if start < position or lines[start : start + len(old)] != old:
            raise ValueError(f"the hunk at line {start + 1} does not match")
        result += lines[position:start] + new
        position = start + len(old)
    return b"\n".join(result + lines[position:])


def add_patch_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `patch check|apply|revert` to the command line of `lava-sglang`."""
    parser = subparsers.add_parser(
        "patch",
        help="check, apply or revert the optional patches of SGLang's source",
        description="Optional patches of the installed SGLang; the plugin works without them.",
    )
    parser.add_argument(
        "action",
        choices=("check", "apply", "revert"),
        help="check: show the state, change nothing; apply, revert: all patches or none",
    )
    parser.set_defaults(run=run_patch)


def run_patch(args: argparse.Namespace) -> int:
    """Do `args.action` on the installed SGLang; returns the exit status, 1 when refused."""
    console, errors = Console(), Console(stderr=True, soft_wrap=True, markup=False)
    changed: list[Path] = []
    try:
        install = SGLangInstall.find()
        series = PatchSeries.load(install.version)
        if args.action == "apply":
            changed = apply(series, install)
        elif args.action == "revert":
            changed = revert(series, install)
        statuses = status(series, install)
        console.print(_table(install, statuses))
        if changed:
            console.print(f"{len(changed)} files changed. Restart servers that are running.")
        if {entry.state for entry in statuses} not in ({PatchState.PRISTINE}, {PatchState.APPLIED}):
            raise PatchError(_reasons(series, install, statuses, PatchState.PRISTINE))
    except PatchError as error:
        for reason in error.reasons:
            errors.print(f"lava-sglang patch {args.action}: {reason}")
        return 1
    except OSError as error:
        errors.print(f"lava-sglang patch {args.action}: {error}")
        return 1
    return 0


def _rewrite(
    series: PatchSeries, install: SGLangInstall, before: PatchState, after: PatchState
) -> list[Path]:
    statuses = status(series, install)
    versions_match = install.version == series.sglang_version
    if versions_match and all(entry.state is after for entry in statuses):
        return []
    reasons = _reasons(series, install, statuses, before)
    if reasons:
        raise PatchError(reasons)
    contents = {}
    for entry in statuses:
        to_apply = after is PatchState.APPLIED
        expected = entry.patch.patched_sha256 if to_apply else entry.patch.target_sha256
        content = apply_diff(entry.path.read_bytes(), series.diff(entry.patch), not to_apply)
        if _sha256(content) != expected:
            raise PatchError([f"{entry.patch.file}: its result is not sha256 {expected}"])
        contents[entry.path] = content
    _replace_all(contents)
    return list(contents)


def _reasons(
    series: PatchSeries, install: SGLangInstall, statuses: list[PatchStatus], wanted: PatchState
) -> list[str]:
    """Why the targets cannot be rewritten from the state `wanted`; empty if they can."""
    reasons = []
    if install.version != series.sglang_version:
        reasons.append(
            f"sglang {install.version} is installed: these patches accept {series.sglang_version}"
        )
    for entry in statuses:
        if entry.state is not wanted:
            expected = entry.patch.target_sha256
            if wanted is PatchState.APPLIED:
                expected = entry.patch.patched_sha256
            reasons.append(
                f"{entry.path} (sglang {install.version}): {entry.state.value}; "
                f"found sha256 {entry.found_sha256}, expected {expected} ({wanted.value})"
            )
    if reasons:
        reasons.append(
            "nothing was changed; to start from SGLang's own files: pip install "
            f"--force-reinstall --no-deps sglang=={install.version}"
        )
    return reasons


def _hunks(diff: bytes, reverse: bool) -> Iterator[tuple[int, list[bytes], list[bytes]]]:
    """For each hunk: the 0-based first line, the lines that it expects and those that it leaves."""
    parts = _HUNK_HEADER.split(diff)  # [preamble, old start, new start, body, ...]
    for old_start, new_start, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        lines = body.split(b"\n")
        old = [line[1:] for line in lines if line[:1] in (b" ", b"-")]
        new = [line[1:] for line in lines if line[:1] in (b" ", b"+")]
        if reverse:
            old_start, old, new = new_start, new, old
        yield int(old_start) - 1, old, new


def _replace_all(contents: dict[Path, bytes]) -> None:
    """Replace files atomically. None is replaced until every new one is on the disk."""
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = _stage(path, content)
        for path, new in staged.items():
            os.replace(new, path)
    finally:
        for new in staged.values():
            new.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    """A new file beside `path`, with its mode: a rename within a folder is atomic."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as new:
        new.write(content)
        new.flush()
        os.fsync(new.fileno())
    shutil.copymode(path, new.name)
    return Path(new.name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _table(install: SGLangInstall, statuses: list[PatchStatus]) -> Table:
    table = Table(title=f"SGLang {install.version} in {install.package_dir}", title_justify="left")
    for column in ("file", "state", "why"):
        table.add_column(column, overflow="fold")
    for entry in statuses:
        table.add_row(entry.patch.target, entry.state.value, entry.patch.why)
    return table
