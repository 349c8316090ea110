# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for four chips without one, and prints what each would use.

    python -m tests.kernels.aot [--full] [--target sm_90 ...] [--json FILE]

The real host functions run on CPU tensors under a stub driver: each launch is compiled with the
specialisation, constants and warps that the host code chose, and is not executed. Exits with 1 on
a spill, on shared memory past the chip's limit, on a 32-bit product in an address, or where rows
of the arena are loaded one value at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.aot_cases import Case, cases
from tests.kernels.ttir import narrow_products


@dataclass(frozen=True)
class Chip:
    """Limits of one chip; NVIDIA's from the CUDA programming guide, AMD's from the CDNA 3 ISA."""

    target: GPUTarget
    block_shared: int  # bytes a block may have
    shared: int  # bytes of a multiprocessor
    registers: int  # 32-bit, of a multiprocessor (of one lane of a SIMD on AMD)
    warps: int  # resident on a multiprocessor

    def occupancy(self, row: Row) -> float:
        """Resident warps over the most there can be, by registers and shared memory alone."""
        if self.target.backend == "hip":
            # Four SIMDs a unit, 8 waves each.
            waves = 4 * min(8, self.registers // max(8, -(-row.registers // 8) * 8))
            blocks = waves // row.warps
        else:
            warp_registers = -(-row.registers * 32 // 256) * 256
            blocks = self.registers // warp_registers // row.warps
        reserved = 1024 if self.target.backend == "cuda" else 0
        blocks = min(blocks, 32, self.warps // row.warps)
        if row.shared:
            blocks = min(blocks, self.shared // (row.shared + reserved))
        return blocks * row.warps / self.warps


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, 167936, 65536, 64),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, 233472, 65536, 64),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, 233472, 65536, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 65536, 512, 32),
}


@dataclass
class Row:
    """One kernel of one case on one chip.

    spills: bytes of stack, or spilled registers. scalar_loads: loads of one 8- or 16-bit value.
    """

    case: str
    kernel: str
    chip: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    scalar_loads: int
    narrow: list[str]

    @property
    def problems(self) -> list[str]:
        limit = CHIPS[self.chip].block_shared
        found = [f"32-bit product in an address: {line}" for line in self.narrow]
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.scalar_loads:
            found.append(f"{self.scalar_loads} loads of one value each")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {limit}")
        return found


class StubDriver:
    """What Triton's launcher asks of a driver, for a chip that is not there."""

    def __init__(self, name: str):
        self.target = CHIPS[name].target
        # Triton caches compiled kernels by device: one device a chip, or it mixes them up.
        self.device = list(CHIPS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def captured(chip: str) -> Iterator[list[Any]]:
    """Compile every launch inside for `chip` instead of running it; yields the kernels."""
    kernels: list[Any] = []
    launch = JITFunction.run

    @functools.wraps(launch)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.metadata.target == CHIPS[chip].target, kernel.metadata.target
        kernels.append(kernel)
        return kernel

    driver.set_active(StubDriver(chip))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch


def compile_case(case: Case, chip: str) -> list[Row]:
    with captured(chip) as kernels:
        case.launch()
    unique = {kernel.hash: kernel for kernel in kernels}
    return [_row(case.name, kernel, chip) for kernel in unique.values()]


def compile_all(chip: str, full: bool) -> list[Row]:
    return [row for case in cases(full) for row in compile_case(case, chip)]


def _row(case: str, kernel: Any, chip: str) -> Row:
    read = _amd_usage if "amdgcn" in kernel.asm else _nvidia_usage
    registers, spills, instructions, scalar_loads = read(kernel)
    return Row(
        case=case,
        kernel=kernel.metadata.name,
        chip=chip,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        instructions=instructions,
        scalar_loads=scalar_loads,
        narrow=narrow_products(kernel.asm["ttir"]),
    )


def _nvidia_usage(kernel: Any) -> tuple[int, int, int, int]:
    tools = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        dump = [str(tools / "cuobjdump"), "--dump-resource-usage", "-sass", cubin.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, text[-500:]
    registers, stack, local = map(int, usage.groups())
    instructions = len(re.findall(r"/\*[0-9a-f]{4,5}\*/", text))
    scalar_loads = len(re.findall(r"LDG\.E\.[US](?:8|16)", text))
    return registers, stack + local, instructions, scalar_loads


def _amd_usage(kernel: Any) -> tuple[int, int, int, int]:
    text = kernel.asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found.group(1))

    registers = count("vgpr_count")  # accumulation registers included
    spills = count("vgpr_spill_count") + count("sgpr_spill_count")
    spills += count("private_segment_fixed_size")
    instructions = len(re.findall(r"^\t[a-z]+_\w+ ", text, re.MULTILINE))
    scalar_loads = len(re.findall(r"(?:global|buffer)_load_[us](?:byte|short)", text))
    return registers, spills, instructions, scalar_loads


def table(rows: list[Row]) -> str:
    lines = [
        f"{'case':34} {'kernel':18} {'chip':7} warps regs spills  shared instr occupancy",
    ]
    for row in rows:
        lines.append(
            f"{row.case:34} {row.kernel:18} {row.chip:7} {row.warps:5} {row.registers:4} "
            f"{row.spills:6} {row.shared:7} {row.instructions:5} "
            f"{CHIPS[row.chip].occupancy(row):9.0%}"
        )
        lines += [f"    {problem}" for problem in row.problems]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.kernels.aot")
    parser.add_argument("--full", action="store_true", help="every head dim, group and dtype")
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args(argv)
    # A process each: the active driver belongs to a whole process.
    workers = min(len(args.target), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(functools.partial(compile_all, full=args.full), args.target)
        rows = [row for part in parts for row in part]
    print(table(rows))
    broken = [row for row in rows if row.problems]
    print(f"{len(rows)} kernels, {len(broken)} with problems")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) | {"problems": row.problems} for row in rows]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
