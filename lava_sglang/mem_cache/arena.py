# SPDX-License-Identifier: Apache-2.0
"""All KV entries of a model in one tensor, so that the places of any layer are addressable.

The arena is [num_layers, 2, slots, num_kv_heads, head_dim], K at [:, 0] and V at [:, 1]. The views
of one layer are what SGLang would have allocated: same shape, strides and bytes.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

HUGE_PAGE = 2 << 20  # bytes, on x86 and most of Arm


def create_arena(
    num_layers: int,
    slots: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """A zeroed arena. slots: a whole number of pages. On a CPU it asks for huge pages."""
    shape = torch.Size((num_layers, 2, slots, num_kv_heads, head_dim))
    if torch.device(device).type == "cpu":
        return _on_huge_pages(shape.numel() * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def _on_huge_pages(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 [num_bytes], on huge pages where the system has them.

    Decode gathers rows from all over the arena: with small pages most of them miss the TLB.
    """
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    every = torch.frombuffer(memory, dtype=torch.uint8)  # holds the mapping
    first = -every.data_ptr() % HUGE_PAGE
    return every[first : first + num_bytes]


def layer_views(arena: torch.Tensor, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V buffers by layer, each [rows, num_kv_heads, head_dim], views of the arena."""
    keys = [layer[0, :rows] for layer in arena.unbind(0)]
    values = [layer[1, :rows] for layer in arena.unbind(0)]
    return keys, values
