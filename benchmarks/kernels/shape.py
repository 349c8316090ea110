# SPDX-License-Identifier: Apache-2.0
"""What a decode benchmark reads: the shape of a batch, and a tape with uneven heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.kernels.timing import Timing

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass
class Shape:
    """One point of the sweep. Lengths are physical: prefix + budget + tail."""

    batch: int
    context: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype

    @property
    def query_dtype(self) -> torch.dtype:
        """A model has no queries of eight bits."""
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype

    @property
    def bytes_read(self) -> int:
        """K and V of every entry, once, of one layer."""
        entries = self.batch * self.context * self.num_kv_heads
        return 2 * entries * self.head_dim * self.dtype.itemsize


def uneven_offsets(
    shape: Shape, num_layers: int, budget: int, generator: torch.Generator
) -> torch.Tensor:
    """int32 [heads + 1]: each head of a layer keeps half to one and a half times the mean.

    Every layer keeps num_kv_heads * budget entries, so all layers read the same bytes.
    """
    share = 0.5 + torch.rand(num_layers, shape.num_kv_heads, generator=generator)
    ends = (share / share.sum(1, keepdim=True)).cumsum(1) * shape.num_kv_heads * budget
    ends[:, -1] = shape.num_kv_heads * budget
    ends += torch.arange(num_layers)[:, None] * shape.num_kv_heads * budget
    return torch.cat([torch.zeros(1), ends.view(-1).double()]).round().int()


def as_json(
    results: Sequence[tuple[Shape, dict[str, Timing]]], num_layers: int = 1
) -> list[dict[str, Any]]:
    """One object for each shape. num_layers: that one call reads."""
    return [
        {
            **asdict(shape),
            "dtype": str(shape.dtype).removeprefix("torch."),
            "bytes_read": num_layers * shape.bytes_read,
            "seconds": {name: timing.as_json() for name, timing in timings.items()},
        }
        for shape, timings in results
    ]
