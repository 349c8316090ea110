# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step's attention, all layers, on a GPU against the bytes that it must read.

Over the same K and V entries, in turn in one run, each captured as a CUDA graph: our kernel over
uncompressed rows, our kernel over a tape with uneven heads, FlashInfer's paged decode and
FlashAttention 3 (what SGLang serves on this GPU without us) and a plain read of as many bytes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.shape import DTYPES, Shape, as_json, uneven_offsets
from benchmarks.kernels.timing import Timing
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode
from lava_sglang.tools.machine import process_line, write_report

ROWS, TAPE, FLASHINFER, FA3, PLAIN = "lava, rows", "lava, tape", "FlashInfer", "FA3", "plain read"
READERS = (ROWS, TAPE, FLASHINFER, FA3, PLAIN)


class Batch:
    """An arena of random K and V, the requests of one shape in slots in random order."""

    def __init__(self, shape: Shape, num_layers: int, sliding_window: int = 0):
        self.shape, self.num_layers, self.sliding_window = shape, num_layers, sliding_window
        self.scaling = shape.head_dim**-0.5
        g = torch.Generator("cuda").manual_seed(0)
        num_slots = shape.batch * shape.context + 1  # slot 0 is padding
        self.arena = torch.empty(
            num_layers, 2, num_slots, shape.num_kv_heads, shape.head_dim,
            dtype=shape.dtype, device="cuda",
        )  # fmt: skip
        for layer in self.arena:  # one at a time: eight bits come from numbers of more
            layer.copy_(torch.empty(layer.shape, device="cuda").normal_(generator=g))
        slots = torch.randperm(num_slots - 1, generator=g, device="cuda").int() + 1
        rows = shape.batch + 1
        self.req_to_token = torch.zeros(rows, shape.context, dtype=torch.int32, device="cuda")
        self.req_to_token[1:] = slots.view(shape.batch, shape.context)
        self.requests = torch.arange(1, rows, device="cuda")
        self.seq_lens = torch.full((shape.batch,), shape.context, device="cuda")
        prefix_len, tail = shape.context // 8, min(64, shape.context // 8)
        self.prefix_lens = torch.full((rows,), prefix_len, dtype=torch.int32, device="cuda")
        budget = shape.context - prefix_len - tail
        self.budgets = torch.full((rows,), budget, dtype=torch.int32, device="cuda")
        self.none = torch.zeros_like(self.budgets)  # uncompressed
        offsets = uneven_offsets(shape, num_layers, budget, torch.Generator().manual_seed(0))
        self.offsets = offsets.cuda().expand(rows, -1).contiguous()
        num_qo_heads = shape.num_kv_heads * shape.group
        self.q = torch.randn(
            shape.batch, num_qo_heads, shape.head_dim, generator=g, device="cuda"
        ).to(shape.query_dtype)
        self.out = torch.empty_like(self.q)
        self.workspace = DecodeWorkspace(
            shape.batch, num_qo_heads, shape.num_kv_heads, shape.head_dim, "cuda"
        )

    def readers(self) -> dict[str, Callable[[int], object]]:
        """What is timed: each reads one layer. Libraries that are not installed are left out."""
        found: dict[str, Callable[[int], object]] = {
            ROWS: lambda layer: self.lava(layer, self.none),
            TAPE: lambda layer: self.lava(layer, self.budgets),
            PLAIN: lambda layer: torch.sum(self.arena[layer].view(torch.int32), dtype=torch.int32),
        }
        if self.sliding_window or self.shape.dtype.itemsize == 1:
            return found  # the libraries are told of neither here
        for name, module, make in (
            (FLASHINFER, "flashinfer", self.flashinfer),
            (FA3, "sgl_kernel.flash_attn", self.flash_attention),
        ):
            try:
                found[name] = make(importlib.import_module(module))
            except (ImportError, OSError) as error:
                Console(stderr=True).print(f"{name} is left out: {error}")
        return found

    def lava(self, layer: int, budgets: torch.Tensor) -> None:
        ragged_decode(
            self.q, self.arena, layer,
            BatchTables(
                self.req_to_token, self.requests, self.seq_lens, self.prefix_lens, budgets,
                self.offsets,
            ),
            self.scaling, self.out, sliding_window=self.sliding_window,
            workspace=self.workspace,
        )  # fmt: skip

    def flashinfer(self, module: Any) -> Callable[[int], object]:
        shape = self.shape
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD",
            use_tensor_cores=shape.group >= 4,
        )  # fmt: skip
        wrapper.plan(
            torch.arange(shape.batch + 1, dtype=torch.int32) * shape.context,
            self.req_to_token[1:].flatten(),
            torch.ones(shape.batch, dtype=torch.int32),
            shape.num_kv_heads * shape.group, shape.num_kv_heads, shape.head_dim, 1,
            q_data_type=shape.dtype, kv_data_type=shape.dtype, sm_scale=self.scaling,
        )  # fmt: skip
        # [slots, page size 1, num_kv_heads, head_dim]
        return lambda layer: wrapper.run(
            self.q, (self.arena[layer, 0].unsqueeze(1), self.arena[layer, 1].unsqueeze(1))
        )

    def flash_attention(self, module: Any) -> Callable[[int], object]:
        lengths = self.seq_lens.int()
        return lambda layer: module.flash_attn_with_kvcache(
            self.q[:, None],
            self.arena[layer, 0].unsqueeze(1),
            self.arena[layer, 1].unsqueeze(1),
            cache_seqlens=lengths,
            page_table=self.req_to_token[1:],
            softmax_scale=self.scaling,
            causal=True,
        )


def captured(read: Callable[[int], object], num_layers: int) -> torch.cuda.CUDAGraph:
    """All layers, one after the other, as a decode step runs them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        read(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            read(layer)
    return graph


def measure(arguments: argparse.Namespace) -> Iterator[tuple[Shape, dict[str, Timing]]]:
    """Each shape of the sweep and the timings of everything that reads it."""
    for batch_size in arguments.batch:
        for context in arguments.context:
            shape = Shape(
                batch_size, context, arguments.kv_heads, arguments.group, arguments.head_dim,
                DTYPES[arguments.dtype],
            )  # fmt: skip
            free = torch.cuda.mem_get_info()[0]
            if arguments.layers * shape.bytes_read > 0.8 * free:
                Console(stderr=True).print(f"{batch_size} x {context} is left out: no memory")
                continue
            batch = Batch(shape, arguments.layers, arguments.sliding_window)
            readers = batch.readers()  # they own what the graphs read
            graphs = {name: captured(read, arguments.layers) for name, read in readers.items()}
            timings = {name: Timing() for name in READERS if name in graphs}
            for _ in range(arguments.rounds):
                for name, timing in timings.items():
                    timing.samples.append(_seconds(graphs[name]))
            yield shape, timings
            del batch, readers, graphs
            torch.cuda.empty_cache()


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of the second of two replays, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / 1e3)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; benchmarks.kernels.decode_cpu measures the CPU's kernel")
    results = list(measure(arguments))
    console = Console()
    console.print(_table(arguments, results))
    machine = process_line()
    console.print(machine, highlight=False, soft_wrap=True)
    write_report(arguments, machine, results=as_json(results, arguments.layers))


def _table(
    arguments: argparse.Namespace, results: Sequence[tuple[Shape, dict[str, Timing]]]
) -> Table:
    table = Table(
        title=f"{arguments.layers} layers, {arguments.kv_heads} KV heads x {arguments.group} x "
        f"{arguments.head_dim}, {arguments.dtype}, slots in random order",
        caption="ms of a step's attention, median (GB/s of K and V)",
    )
    for heading in ("batch", "context", "GB", *READERS):
        table.add_column(heading, justify="right")
    for shape, timings in results:
        num_bytes = arguments.layers * shape.bytes_read
        cells = [
            f"{timings[name].median * 1e3:.3f} ({num_bytes / timings[name].median / 1e9:,.0f})"
            if name in timings
            else "-"
            for name in READERS
        ]
        table.add_row(str(shape.batch), str(shape.context), f"{num_bytes / 1e9:.2f}", *cells)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    add("--context", type=int, nargs="+", default=[1024, 4096, 16384])
    add("--layers", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--group", type=int, default=4, help="query heads per KV head")
    add("--head-dim", type=int, default=128)
    dtypes = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
    add("--dtype", choices=dtypes, default="bfloat16", help="of the entries (%(default)s)")
    add("--sliding-window", type=int, default=0, help="entries that ours attends to, 0: all")
    add("--rounds", type=int, default=15, help="times that they take turns")
    add("--json", type=Path, help="write the results to this file too")
    return parser


if __name__ == "__main__":
    main()
