# SPDX-License-Identifier: Apache-2.0
"""Time of one layer's decode attention on the CPU against the bytes that it must read.

Three things read the same K and V bytes, in turn in one run: the ragged decode op, SGLang's
torch_native (gather, then SDPA), and a plain threaded read of that memory from front to back. Each
call takes the next layer of an arena that is larger than the caches. With --ragged the op reads a
tape with uneven heads; torch_native, which cannot, reads as many entries in the stock layout.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads disturb

import numpy as np
import torch
from numba import njit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.shape import DTYPES, Shape, as_json, uneven_offsets
from benchmarks.kernels.timing import Timing
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.cpu.ragged_decode import compile_ragged_decode, ragged_decode_cpu
from lava_sglang.mem_cache.arena import create_arena
from lava_sglang.tools.machine import process_line, write_report

LAVA, NATIVE, PLAIN = "lava", "torch_native", "plain read"
COLORS = {LAVA: "C0", NATIVE: "C3", PLAIN: "C2"}
MAX_LAYERS = 512


class Batch:
    """An arena of random K and V, the requests of one shape on it, and what reads them."""

    def __init__(self, shape: Shape, memory: torch.Tensor, ragged: bool, contiguous: bool):
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        num_slots = shape.batch * shape.context + 1  # slot 0 is padding
        layer_shape = (2, num_slots, shape.num_kv_heads, shape.head_dim)
        layer_size = int(np.prod(layer_shape))
        self.num_layers = min(MAX_LAYERS, memory.numel() // layer_size)
        self.arena = memory[: self.num_layers * layer_size].view(self.num_layers, *layer_shape)
        slots = torch.arange(1, num_slots)
        if not contiguous:
            slots = slots[torch.randperm(num_slots - 1, generator=generator)]
        self.req_to_token = torch.zeros(shape.batch + 1, shape.context, dtype=torch.int32)
        self.req_to_token[1:] = slots.view(shape.batch, shape.context)
        self.requests = torch.arange(1, shape.batch + 1)
        self.seq_lens = torch.full((shape.batch,), shape.context)
        self.prefix_lens = torch.zeros(shape.batch + 1, dtype=torch.int32)
        self.budgets = torch.zeros(shape.batch + 1, dtype=torch.int32)
        heads = self.num_layers * shape.num_kv_heads
        self.offsets = torch.zeros(shape.batch + 1, heads + 1, dtype=torch.int32)
        if ragged:
            prefix_len, tail = shape.context // 8, min(64, shape.context // 8)
            budget = shape.context - prefix_len - tail
            self.prefix_lens[1:], self.budgets[1:] = prefix_len, budget
            self.offsets[1:] = uneven_offsets(shape, self.num_layers, budget, generator)
        num_qo_heads = shape.num_kv_heads * shape.group
        self.q = torch.randn(shape.batch, num_qo_heads, shape.head_dim, generator=generator).to(
            shape.dtype
        )
        self.out = torch.empty_like(self.q)
        self.words = self.arena.view(-1).view(torch.int64).numpy()
        self.next_layer = itertools.cycle(range(self.num_layers))
        self.pool = ThreadPoolExecutor(max(1, torch.get_num_threads() - 1))
        self.native = _torch_native()

    def readers(self) -> dict[str, Callable[[], None]]:
        """What is timed; each call takes the next layer."""
        return {LAVA: self.lava, NATIVE: self.torch_native, PLAIN: self.plain}

    def lava(self) -> None:
        ragged_decode_cpu(
            self.q, self.arena, next(self.next_layer),
            BatchTables(
                self.req_to_token, self.requests, self.seq_lens, self.prefix_lens, self.budgets,
                self.offsets,
            ),
            self.shape.head_dim**-0.5, self.out,
        )  # fmt: skip

    def torch_native(self) -> None:
        k, v = self.arena[next(self.next_layer)]
        self.native(
            self.q, self.out, k, v, self.req_to_token, self.requests, self.seq_lens,
            scaling=self.shape.head_dim**-0.5, enable_gqa=self.shape.group > 1,
        )  # fmt: skip

    def plain(self) -> None:
        size = self.words.size // self.num_layers
        first = next(self.next_layer) * size
        num_threads = torch.get_num_threads()
        edges = [first + size * thread // num_threads for thread in range(num_threads + 1)]
        parts = [self.words[begin:end] for begin, end in itertools.pairwise(edges)]
        others = [self.pool.submit(_read, part) for part in parts[1:]]
        _read(parts[0])
        for other in others:
            other.result()


@njit(nogil=True, cache=True)
def _read(words):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for i in range(words.size):
        total += words[i]
    return total


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = list(measure(arguments))
    console = Console()
    console.print(_table(arguments, results))
    machine = process_line()
    console.print(machine, highlight=False, soft_wrap=True)
    write_report(arguments, machine, results=as_json(results))
    if arguments.plot is not None:
        plot(results, machine, arguments.plot)


def measure(arguments: argparse.Namespace) -> Iterator[tuple[Shape, dict[str, Timing]]]:
    """Each shape of the sweep and the timings of everything that reads it."""
    dtype = DTYPES[arguments.dtype]
    compile_ragged_decode(
        arguments.kv_heads * arguments.group, arguments.kv_heads, arguments.head_dim, dtype
    )
    sweep = [
        Shape(batch, context, arguments.kv_heads, arguments.group, arguments.head_dim, dtype)
        for batch in arguments.batch
        for context in arguments.context
    ]
    smallest = max(shape.bytes_read + shape.bytes_read // shape.context for shape in sweep)
    num_bytes = max(arguments.arena_mib << 20, 2 * smallest)
    slots = num_bytes // (2 * arguments.head_dim * dtype.itemsize)
    memory = create_arena(1, slots, 1, arguments.head_dim, dtype, "cpu").view(-1)
    for part in memory.split(1 << 24):
        part.normal_()
    for shape in track(sweep, console=Console(stderr=True)):
        batch = Batch(shape, memory, arguments.ragged, arguments.slots == "contiguous")
        readers = batch.readers()
        timings = {name: Timing() for name in readers}
        repeats = {name: _repeats(read, arguments.round_ms) for name, read in readers.items()}
        for _ in range(arguments.rounds):
            for name, read in readers.items():
                for _ in range(repeats[name]):
                    begin = time.perf_counter()
                    read()
                    timings[name].samples.append(time.perf_counter() - begin)
        yield shape, timings


def plot(results: Sequence[tuple[Shape, dict[str, Timing]]], machine: str, path: Path) -> None:
    """Milliseconds of a call over the bytes it must read, both logarithmic. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(results, key=lambda result: result[0].bytes_read)
    sizes = [shape.bytes_read / 1e6 for shape, _ in ordered]
    for name, color in COLORS.items():
        medians = [timings[name].median * 1e3 for _, timings in ordered]
        minima = [timings[name].minimum * 1e3 for _, timings in ordered]
        axes.plot(sizes, medians, ".", color=color, label=f"{name}, median")
        axes.plot(sizes, minima, "_", color=color, markersize=9, label=f"{name}, minimum")
    axes.set(
        xscale="log", yscale="log", xlabel="K and V bytes of the batch, one layer (MB)",
        ylabel="time of one call (ms)", title="Decode attention of one layer on the CPU",
    )  # fmt: skip
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.supxlabel(machine, fontsize=7)
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    add("--context", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    add("--kv-heads", type=int, default=3)
    add("--group", type=int, default=3, help="query heads per KV head")
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--slots", choices=["random", "contiguous"], default="random")
    add("--ragged", action="store_true", help="a tape with uneven heads: 1/8 prefix, 64 tail")
    add("--threads", type=int, default=0, help="torch's number of threads (default: torch's own)")
    add("--rounds", type=int, default=8, help="times that the three take turns")
    add("--round-ms", type=float, default=60.0, help="time of each in a round (5 to 200 calls)")
    add("--arena-mib", type=int, default=1024, help="memory to rotate through, for all layers")
    add("--json", type=Path, help="write the results to this file too")
    add("--plot", type=Path, help="draw the results to this PNG (needs matplotlib)")
    return parser


def _torch_native() -> Callable[..., Any]:
    """SGLang's own decode function where SGLang is installed, else the same written out."""
    try:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    except ImportError:
        return _gather_and_attend
    return TorchNativeAttnBackend._run_sdpa_forward_decode.__get__(
        object.__new__(TorchNativeAttnBackend)
    )


def _gather_and_attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
    enable_gqa: bool,
) -> None:
    for place, (row, seq_len) in enumerate(zip(req_pool_indices, seq_lens, strict=True)):
        slots = req_to_token[row, :seq_len]
        output[place] = scaled_dot_product_attention(
            query[place][None, :, None],
            k_cache[slots].movedim(0, 1)[None],
            v_cache[slots].movedim(0, 1)[None],
            enable_gqa=enable_gqa,
            scale=scaling,
        )[0, :, 0]


def _repeats(read: Callable[[], None], round_ms: float) -> int:
    read()
    begin = time.perf_counter()
    read()
    return int(min(200, max(5, round_ms / 1e3 / (time.perf_counter() - begin))))


def _table(
    arguments: argparse.Namespace, results: Sequence[tuple[Shape, dict[str, Timing]]]
) -> Table:
    layout = "tape with uneven heads" if arguments.ragged else "uncompressed"
    table = Table(
        title=f"one layer, {arguments.kv_heads} KV heads x {arguments.group} x "
        f"{arguments.head_dim}, {arguments.dtype}, {arguments.slots} slots, {layout}",
        caption="ms of one call: median [10% - 90%] minimum. lava's time over the others': of "
        "medians (of minima). Where the cores are shared, a minimum is a moment with more of them.",
    )
    for heading in (
        "batch", "context", "MB", *(f"{name} (ms)" for name in COLORS), "x plain read",
        "x torch_native",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for shape, timings in results:
        lava, plain = timings[LAVA], timings[PLAIN]
        table.add_row(
            str(shape.batch),
            str(shape.context),
            f"{shape.bytes_read / 1e6:.1f}",
            *(timings[name].milliseconds() for name in COLORS),
            f"{lava.median / plain.median:.2f} ({lava.minimum / plain.minimum:.2f})",
            f"1 / {timings[NATIVE].median / lava.median:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
