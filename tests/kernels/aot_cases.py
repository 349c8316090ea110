# SPDX-License-Identifier: Apache-2.0
"""The launches that `aot` compiles: each public op on CPU tensors that are never read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lava_sglang.kernels.arena import as_bits
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.compact import compact_triton
from lava_sglang.kernels.flashinfer_decode import exact_slots_triton, tape_pages_triton
from lava_sglang.kernels.layer_split import layer_entropy_triton, layer_split_triton
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode_triton
from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.kernels.select import select_triton
from lava_sglang.kernels.trim import move_triton
from lava_sglang.kernels.window_scores import window_scores_triton

LAYERS, KV_HEADS, SLOTS, PROMPT, BUDGET, WINDOW = 4, 8, 4096, 1024, 256, 32


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], object]


def cases(full: bool) -> list[Case]:
    """The subset for CI, or every head dim, group and dtype."""
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    decode = [(128, 4, bf16), (64, 7, e4m3), (256, 1, bf16), (96, 8, torch.float32)]
    if full:
        decode = [
            (head_dim, group, dtype)
            for head_dim in (64, 128, 256)
            for group in (1, 3, 4, 7, 8, 16)
            for dtype in (bf16, e4m3)
        ]
        decode += [(80, 4, bf16), (96, 4, bf16), (128, 4, torch.float8_e5m2)]
        decode += [(128, 4, torch.float16), (128, 4, torch.float32)]
    window = [(128, 4, bf16), (64, 7, e4m3), (256, 1, bf16), (96, 2, torch.float32)]
    if full:
        window += [(64, 3, bf16), (128, 8, e4m3), (128, 16, bf16), (80, 5, bf16)]
        window += [(256, 1, torch.float32), (128, 4, torch.float16)]
    capped = [(256, 2, bf16)]
    if full:
        capped += [(256, 4, bf16), (128, 2, bf16), (256, 2, e4m3), (256, 2, torch.float32)]
    copied = [(128, bf16), (96, torch.float32), (64, e4m3)]
    if full:
        copied += [(head_dim, bf16) for head_dim in (64, 80, 256)]
    return [
        *(_decode(*shape) for shape in decode),
        *(_decode(*shape, logit_cap=50) for shape in capped),
        *(_window_scores(*shape, span=span) for shape in window for span in (0, 16)),
        *(_window_scores(*shape, span=16, logit_cap=50) for shape in capped),
        *(_compact(*shape) for shape in copied),
        *(_move(*shape) for shape in copied),
        *(_select(num_kv_heads) for num_kv_heads in ((8, 1, 40) if full else (8,))),
        *(_page_lists(num_kv_heads) for num_kv_heads in ((8, 1, 40) if full else (8,))),
        *(_layer_split(num_layers) for num_layers in ((32, 80, 128) if full else (32,))),
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("float8_")


def _arena(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(LAYERS, 2, SLOTS, KV_HEADS, head_dim, dtype=dtype)


def _model_dtype(kv_dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if kv_dtype.itemsize == 1 else kv_dtype


def _decode(head_dim: int, group: int, kv_dtype: torch.dtype, *, logit_cap: float = 0.0) -> Case:
    def launch() -> None:
        bs, rows = 16, 64
        workspace = DecodeWorkspace(
            bs, KV_HEADS * group, KV_HEADS, head_dim, "cpu", num_programs=528
        )
        ragged_decode_triton(
            torch.empty(bs, KV_HEADS * group, head_dim, dtype=_model_dtype(kv_dtype)),
            _arena(head_dim, kv_dtype),
            1,
            BatchTables(
                torch.zeros(rows, 8192, dtype=torch.int32),
                torch.zeros(bs, dtype=torch.int64),
                torch.zeros(bs, dtype=torch.int64),
                torch.zeros(rows, dtype=torch.int32),
                torch.zeros(rows, dtype=torch.int32),
                torch.zeros(rows, LAYERS * KV_HEADS + 1, dtype=torch.int32),
            ),
            head_dim**-0.5,
            sliding_window=512,
            logit_cap=logit_cap,
            workspace=workspace,
        )

    return Case(
        f"{'capped ' if logit_cap else ''}decode D{head_dim} G{group} {_dtype_name(kv_dtype)}",
        launch,
    )


def _window_scores(
    head_dim: int, group: int, kv_dtype: torch.dtype, *, span: int, logit_cap: float = 0.0
) -> Case:
    """With a span, as LAVaSpan calls it; else as LAVa does."""

    def launch() -> None:
        dtype = _model_dtype(kv_dtype)
        window_scores_triton(
            torch.empty(LAYERS, WINDOW, KV_HEADS * group, head_dim, dtype=dtype),
            _arena(head_dim, kv_dtype),
            torch.zeros(PROMPT, dtype=torch.int64),
            64,
            WINDOW,
            head_dim**-0.5,
            ScoreOptions(
                root_mean_square=span > 0,
                pool_width=1 if span else 7,
                span=span,
                group_reduce="mean" if span else "max",
                value_norm="token" if span else "head",
            ),
            logit_cap=logit_cap,
        )

    name = "span scores" if span else "scores"
    name = f"capped {name}" if logit_cap else name
    return Case(f"{name} D{head_dim} G{group} {_dtype_name(kv_dtype)}", launch)


def _compact(head_dim: int, dtype: torch.dtype) -> Case:
    def launch() -> None:
        compact_triton(
            _arena(head_dim, dtype),
            torch.zeros(PROMPT, dtype=torch.int64),
            torch.zeros(BUDGET, dtype=torch.int64),
            torch.zeros(LAYERS * KV_HEADS * BUDGET, dtype=torch.int32),
            torch.zeros(LAYERS * KV_HEADS + 1, dtype=torch.int32),
        )

    return Case(f"compact D{head_dim} {_dtype_name(dtype)}", launch)


def _move(head_dim: int, dtype: torch.dtype) -> Case:
    def launch() -> None:
        rows = torch.zeros(BUDGET, dtype=torch.int64)
        move_triton(as_bits(_arena(head_dim, dtype)), rows, rows)

    return Case(f"trim D{head_dim} {_dtype_name(dtype)}", launch)


def _select(num_kv_heads: int) -> Case:
    """With a floor, so that the second pass over single heads is compiled too."""

    def launch() -> None:
        scores = torch.zeros(LAYERS, num_kv_heads, PROMPT)
        counts = torch.zeros(LAYERS, dtype=torch.int64)
        select_triton(scores, counts, BUDGET, 64, WINDOW, head_floor=20)

    return Case(f"select H{num_kv_heads}", launch)


def _page_lists(num_kv_heads: int) -> Case:
    def launch() -> None:
        bs, rows = 16, 64
        table = torch.zeros(rows, dtype=torch.int32)
        batch = torch.zeros(bs, dtype=torch.int64)
        offsets = torch.zeros(rows, LAYERS * num_kv_heads + 1, dtype=torch.int32)
        row_slots = torch.zeros(rows, 8192, dtype=torch.int32)
        tables = BatchTables(row_slots, batch, batch, table, table, offsets)
        tape_pages_triton(
            torch.empty(SLOTS, dtype=torch.int32),
            torch.zeros(LAYERS, bs, dtype=torch.int64),
            torch.empty(LAYERS, 2, SLOTS, num_kv_heads, 128),
            tables,
            BUDGET * num_kv_heads,
        )
        exact_slots_triton(
            torch.empty(SLOTS, dtype=torch.int32),
            torch.zeros(bs + 1, dtype=torch.int32),
            tables,
            PROMPT,
        )

    return Case(f"page lists H{num_kv_heads}", launch)


def _layer_split(num_layers: int) -> Case:
    def launch() -> None:
        weights = layer_entropy_triton(torch.ones(num_layers, KV_HEADS, PROMPT))
        layer_split_triton(weights, num_layers * BUDGET, KV_HEADS * PROMPT)

    return Case(f"split L{num_layers}", launch)
