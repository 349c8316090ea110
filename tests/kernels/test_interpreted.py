# SPDX-License-Identifier: Apache-2.0
"""Runs every file of `launched/` under TRITON_INTERPRET=1, a process each."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("launched/test_*.py"))
ROOT = Path(__file__).parents[2]

Run = subprocess.CompletedProcess[str]


def test_every_kernel_has_a_file() -> None:
    files = (ROOT / "kernels").glob("*.py")
    kernels = {path.stem for path in files if "@triton.jit" in path.read_text()}
    tested = {path.stem.removeprefix("test_") for path in FILES}
    assert kernels - {"arena"} <= tested


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future[Run]]]:
    """The files that were asked for, one on each core at a time."""
    items = [item for item in request.session.items if item.fspath == request.node.fspath]
    paths = [item.callspec.params["path"] for item in items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {path: pool.submit(interpreted, path) for path in paths}


def interpreted(path: Path) -> Run:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path, runs: dict[Path, Future[Run]]) -> None:
    run = runs[path].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
