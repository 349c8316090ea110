# SPDX-License-Identifier: Apache-2.0
"""Runs every file of `launched/` under TRITON_INTERPRET=1, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("launched/test_*.py"))
ROOT = Path(__file__).parents[2]


def test_every_kernel_has_a_file() -> None:
    files = (ROOT / "kernels").glob("*.py")
    kernels = {path.stem for path in files if "@triton.jit" in path.read_text()}
    tested = {path.stem.removeprefix("test_") for path in FILES}
    assert kernels - {"arena"} <= tested


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
