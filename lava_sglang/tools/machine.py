# SPDX-License-Identifier: Apache-2.0
"""What a number belongs to: the processor, the process, the commit and the options."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
FILE_WIDTH = 132
"""Columns of a table that goes to a file."""


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def process_line() -> str:
    """CPU model, cores, threads, load, accelerator, versions and commit."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, {device}; Python {platform.python_version()} "
        f"torch {torch.__version__}; commit {commit()}"
    )


def machine_line() -> str:
    """The same, with the versions of the server."""
    packages = " ".join(f"{name} {version(name)}" for name in ("lava-sglang", "sglang"))
    return f"{process_line()}; {packages}"


def commit() -> str:
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write_report(arguments: argparse.Namespace, machine: str, **found: Any) -> None:
    """What was found to `--json`, if given, with the machine line and all options."""
    if arguments.json is None:
        return
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    report = {"machine": machine, "settings": settings, **found}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
