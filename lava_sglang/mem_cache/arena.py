# SPDX-License-Identifier: Apache-2.0
"""All KV entries of a model in one tensor, so that the places of any layer are addressable.

The arena is [num_layers, 2, slots, num_kv_heads, head_dim], K at [:, 0] and V at [:, 1]. The views
of one layer are what SGLang would have allocated: same shape, strides and bytes.
"""

from __future__ import annotations

import torch


def create_arena(
    num_layers: int,
    slots: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """A zeroed arena. slots: a whole number of pages."""
    shape = (num_layers, 2, slots, num_kv_heads, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def layer_views(arena: torch.Tensor, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V buffers by layer, each [rows, num_kv_heads, head_dim], views of the arena."""
    keys = [layer[0, :rows] for layer in arena.unbind(0)]
    values = [layer[1, :rows] for layer in arena.unbind(0)]
    return keys, values
