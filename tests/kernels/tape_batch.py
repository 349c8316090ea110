# SPDX-License-Identifier: Apache-2.0
"""A made-up decode batch over an arena: requests with a prefix, a tape and a tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.kernels.batch_tables import BatchTables
from tests.kernels.device import generator


@dataclass
class Request:
    """P, b, tail, and how the tape is cut: entries of each (layer, head), or a rule.

    even: b each. random: any cut. first, last: one head has everything.
    """

    prefix: int
    budget: int
    tail: int
    cut: str | list[int] = "random"


@dataclass
class TapeBatch:
    """The tensors that `ragged_decode` takes, by its names."""

    q: torch.Tensor
    arena: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    prefix_lens: torch.Tensor
    budgets: torch.Tensor
    offsets: torch.Tensor
    scaling: float

    def tables(self) -> BatchTables:
        return BatchTables(*(getattr(self, name) for name in BatchTables._fields))


def tape_batch(
    requests: list[Request],
    *,
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    padding_rows: int = 0,
    spare_slots: int = 16,
    seed: int = 0,
) -> TapeBatch:
    """Requests in shuffled rows and slots; stale tables everywhere that must not be read."""
    g = generator(seed)
    lengths = [r.prefix + r.budget + r.tail for r in requests]
    slots = 1 + sum(lengths) + spare_slots
    arena = torch.randn(layers, 2, slots, kv_heads, head_dim, generator=g).to(dtype)
    rows = 1 + len(requests) + 2
    columns = layers * kv_heads
    req_to_token = torch.full((rows, max(lengths, default=1) + 8), 2**30, dtype=torch.int32)
    req_to_token[0] = 0
    prefix_lens = torch.full((rows,), 3, dtype=torch.int32)
    budgets = torch.zeros(rows, dtype=torch.int32)
    offsets = torch.randint(0, 99, (rows, columns + 1), generator=g, dtype=torch.int32)
    order = torch.randperm(rows - 1, generator=g)[: len(requests)] + 1
    free = torch.randperm(slots - 1, generator=g).int() + 1
    for row, request, length in zip(order.tolist(), requests, lengths, strict=True):
        req_to_token[row, :length], free = free[:length], free[length:]
        prefix_lens[row] = request.prefix
        budgets[row] = request.budget
        if request.budget:
            offsets[row] = _cut(request, columns, g)
    padding = [0] * padding_rows
    return TapeBatch(
        q=torch.randn(len(requests) + padding_rows, kv_heads * group, head_dim, generator=g).to(
            dtype
        ),
        arena=arena,
        req_to_token=req_to_token,
        req_pool_indices=torch.tensor(order.tolist() + padding),
        seq_lens=torch.tensor(lengths + [1] * padding_rows),
        prefix_lens=prefix_lens,
        budgets=budgets,
        offsets=offsets,
        scaling=head_dim**-0.5,
    )


def _cut(request: Request, columns: int, g: torch.Generator) -> torch.Tensor:
    places = request.budget * columns
    if request.cut == "random":
        inner = torch.randint(0, places + 1, (columns - 1,), generator=g).sort().values
        return torch.cat([torch.tensor([0]), inner, torch.tensor([places])])
    counts = {
        "even": [request.budget] * columns,
        "first": [places] + [0] * (columns - 1),
        "last": [0] * (columns - 1) + [places],
    }.get(str(request.cut), request.cut)
    assert sum(counts) == places, (counts, places)
    return torch.tensor([0, *counts]).cumsum(0)
