# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every chip without spills, and the checks that say so can fail."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernels.aot import CHIPS, Row, table
from tests.kernels.ttir import narrow_products

ROOT = Path(__file__).parents[2]
GOOD = Row("case", "_kernel", "sm_90", 4, 80, 0, 21504, 1000, 0, [])


def test_every_kernel_compiles_cleanly_for_every_chip(tmp_path: Path) -> None:
    """In a process of its own: the stub driver and TRITON_INTERPRET belong to a whole process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", "--json", str(tmp_path / "rows.json")],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert (tmp_path / "rows.json").exists(), run.stdout[-2000:] + run.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row for row in rows if row["problems"]] == []
    assert run.returncode == 0, run.stderr[-4000:]
    launches = re.compile(r"^ +(_\w+)\[\(", re.MULTILINE)
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    kernels = {name for source in sources for name in launches.findall(source)}
    assert len(kernels) >= 12
    for chip in CHIPS:
        compiled = {row["kernel"] for row in rows if row["chip"] == chip}
        assert kernels <= compiled, kernels - compiled


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 16}, "spills 16"),
        ({"shared": 232449}, "shared memory"),
        ({"chip": "gfx942", "shared": 65537}, "shared memory"),
        ({"scalar_loads": 64}, "one value each"),
        ({"narrow": ["%2 = arith.muli %0, %1 : i32"]}, "32-bit product"),
    ],
)
def test_a_broken_kernel_is_named(change: dict[str, object], problem: str) -> None:
    row = replace(GOOD, **change)
    assert not GOOD.problems
    assert len(row.problems) == 1 and problem in row.problems[0]
    assert problem in table([row])


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 6),  # registers: 80 * 32 lanes * 4 warps in 65,536
        ({"registers": 255}, 2),
        ({"registers": 16}, 10),  # shared memory: 21 KB and 1 KB of the system's in 228 KB
        ({"registers": 16, "shared": 0}, 16),  # warps
        ({"chip": "gfx942", "registers": 100, "shared": 16384}, 4),
    ],
)
def test_occupancy(change: dict[str, object], blocks: int) -> None:
    row = replace(GOOD, **change)
    chip = CHIPS[row.chip]
    assert chip.occupancy(row) == blocks * row.warps / chip.warps


def ttir(body: str) -> str:
    return f"tt.func public @k(%p: !tt.ptr<f16>, %n: i32, %m: i32) {{\n{body}\n tt.return\n}}"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("%0 = arith.muli %n, %m : i32\n%1 = tt.addptr %p, %0 : !tt.ptr<f16>, i32", 1),
        (
            "%0 = arith.muli %n, %m : i32\n%1 = arith.extsi %0 : i32 to i64\n"
            "%2 = tt.addptr %p, %1 : !tt.ptr<f16>, i64",
            1,
        ),
        ("%0 = arith.muli %n, %m : i64\n%1 = tt.addptr %p, %0 : !tt.ptr<f16>, i64", 0),
        ("%0 = arith.muli %n, %m : i32\n%1 = tt.addptr %p, %n : !tt.ptr<f16>, i32", 0),
        (
            "%c = arith.constant 64 : i32\n%0 = arith.muli %n, %c : i32\n"
            "%1 = tt.addptr %p, %0 : !tt.ptr<f16>, i32",
            0,
        ),
        (
            "%0 = arith.muli %n, %m : tensor<32xi32>\n%1 = tt.addptr %q, %0 : a, b\n"
            "%2 = tt.load %1 : c\n%3 = tt.addptr %p, %2 : a, b",
            1,
        ),
        (
            "%0 = arith.muli %n, %m : i32\n%1 = scf.for %i = %0 to %n step %m "
            "iter_args(%a = %p) -> (i32)  : i32 {\n%2 = tt.addptr %p, %i : a, i32\n"
            "scf.yield %2 : a\n}",
            1,
        ),
        (
            "%0:2 = scf.for %i = %n to %m step %m iter_args(%a = %p, %b = %n) -> (i32, i32) : i32 "
            "{\n%2 = arith.muli %n, %m : i32\nscf.yield %a, %2 : i32, i32\n}\n"
            "%3 = tt.addptr %p, %0#1 : a, i32",
            1,
        ),
    ],
)
def test_narrow_products(body: str, found: int) -> None:
    assert len(narrow_products(ttir(body))) == found
