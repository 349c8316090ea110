# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang doctor`: what a server here would run with, and what it would refuse."""

from __future__ import annotations

import importlib.metadata
import os
import platform as host
import sys
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lava_sglang import __version__
from lava_sglang.integration import refusals
from lava_sglang.integration.seams import SEAMS

DISTRIBUTION = "lava-sglang"
PLUGIN = ("sglang.srt.plugins", "lava")
CPU_PLATFORM = ("sglang.srt.platforms", "lava_cpu")
_PACKAGES = ("torch", "triton", "flashinfer-python")


class Check(NamedTuple):
    """One row. `state` is "ok", "" where nothing is required, or what is wrong."""

    name: str
    state: str
    detail: str


class Section(NamedTuple):
    """One table of the report, and why a server would refuse to start."""

    title: str
    checks: list[Check]
    reasons: list[str]


def run(console: Console) -> int:
    """Print the report; returns the exit status, 1 if a server that compresses would refuse."""
    with console.status("Importing SGLang ..."), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SGLang's modules, about what a CPU cannot run
        sections = [
            versions(),
            plugins(os.environ),
            seams(),
            platform(),  # after SGLang was imported: it tells what took the place of sgl_kernel
            environment(os.environ),
            features(),
        ]
    console.print(f"[bold]lava-sglang {__version__}[/bold]")
    for section in sections:
        console.print(f"\n[bold]{section.title}[/bold]")
        console.print(_table(section.checks))
    reasons = [reason for section in sections for reason in section.reasons]
    if not reasons:
        console.print("\n[green]Nothing here keeps a server from compressing.[/green]")
        console.print("What depends on the model and its options is checked when it starts.")
        return 0
    console.print("\n[red]A server that compresses would refuse to start:[/red]")
    for reason in reasons:
        console.print(f"- {escape(reason)}")
    return 1


def versions() -> Section:
    reasons = refusals.version_reasons()
    checks = [
        Check("python", "", host.python_version()),
        Check("sglang", "wrong" if reasons else "ok", _version("sglang")),
    ]
    checks += [Check(name, "", _version(name)) for name in _PACKAGES]
    return Section("Versions", checks, reasons)


def plugins(environ: Mapping[str, str]) -> Section:
    """Whether SGLang finds our entry points, and whether `environ` makes it skip them."""
    checks, reasons = [], []
    for group, name in (PLUGIN, CPU_PLATFORM):
        found = importlib.metadata.entry_points(group=group, name=name)
        value = ", ".join(entry.value for entry in found)
        state = "ok" if found else "missing"
        if not found:
            reasons.append(
                f"entry point {name} of {group} is missing: install {DISTRIBUTION} with pip into "
                "the environment of SGLang"
            )
        elif (skipped := _skipped_by(group, name, environ)) is not None:
            state = "skipped"
            if (group, name) == PLUGIN or _wants_cpu_engine():
                reasons.append(f"SGLang skips {name} of {group}: {skipped}={environ[skipped]}")
        checks.append(Check(f"{group}: {name}", state, value))
    checks += [_variable(name, environ) for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM")]
    return Section("Plugin", checks, reasons)


def seams() -> Section:
    """Imports SGLang."""
    try:
        reasons = refusals.seam_reasons()
    # Importing SGLang can fail in any way: a native library, a wrong driver, ...
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reasons = [f"SGLang cannot be imported: {type(error).__name__}: {first_line}"]
        return Section("Seams in SGLang", [Check("import", "missing", "sglang")], reasons)
    checks = [Check(seam.how, _seam_state(seam.target, reasons), seam.target) for seam in SEAMS]
    count = sum(check.state == "ok" for check in checks)
    return Section(f"Seams in SGLang: {count} of {len(checks)} ok", checks, reasons)


def platform() -> Section:
    if not _wants_cpu_engine():
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return Section("Platform", [Check("accelerator", "", device)], [])
    from lava_sglang.cpu_platform.sgl_kernel_stub import STAND_IN_VERSION

    version = getattr(sys.modules.get("sgl_kernel"), "__version__", "not loaded")
    kernel = "stand-in for CPU" if version == STAND_IN_VERSION else version
    checks = [Check("engine", "", "CPU, no GPU is used"), Check("sgl_kernel", "", kernel)]
    return Section("Platform", checks, [])


def environment(environ: Mapping[str, str]) -> Section:
    """Variables that switch on what is refused."""
    reasons = refusals.environment_reasons(environ)
    checks = [
        Check(variable, "refused" if any(variable in r for r in reasons) else "ok", feature)
        for variable, feature in refusals.ENVIRONMENT.items()
    ]
    return Section("Environment", checks, reasons)


def features() -> Section:
    """The server options that are refused; a server names those that are on when it starts."""
    checks = [Check(f"--{f.field.replace('_', '-')}", "", f.name) for f in refusals.FEATURES]
    return Section("Refused together with compression", checks, [])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _skipped_by(group: str, name: str, environ: Mapping[str, str]) -> str | None:
    """The variable that makes SGLang skip an entry point. Source: srt/plugins/__init__.py."""
    allowed = [item.strip() for item in environ.get("SGLANG_PLUGINS", "").split(",") if item]
    selected = environ.get("SGLANG_PLATFORM", "")
    # A selected platform hides the distributions of all others, their general plugins too.
    if selected and selected != CPU_PLATFORM[1]:
        return "SGLANG_PLATFORM"
    if selected and (group, name) == CPU_PLATFORM:
        return None
    return "SGLANG_PLUGINS" if allowed and name not in allowed else None


def _wants_cpu_engine() -> bool:
    from lava_sglang.cpu_platform.platform import wants_cpu_engine

    return wants_cpu_engine([], os.environ)


def _variable(name: str, environ: Mapping[str, str]) -> Check:
    return Check(name, "", environ.get(name) or "not set")


def _seam_state(target: str, reasons: list[str]) -> str:
    for reason in reasons:
        if reason.startswith(f"sglang.{target} "):
            return "missing" if " is missing" in reason else "changed"
    return "ok"


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("state", "name", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        colour = {"ok": "green", "": "dim"}.get(check.state, "red")
        state = f"[{colour}]{check.state or '-'}[/{colour}]"
        table.add_row(state, escape(check.name), escape(check.detail))
    return table
