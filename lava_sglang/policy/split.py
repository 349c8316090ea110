# SPDX-License-Identifier: Apache-2.0
"""Step 2, split: how many entries each layer keeps, or each head where heads do not compete."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.kernels.layer_split import layer_split
from lava_sglang.policy.method import Method

HEAD_FLOOR_UNITS = 1_000_000
"""A head floor is read in so many parts of the mean: whole numbers are alike on every device."""


class Split(NamedTuple):
    """How many scored entries are selected together, without those of the window."""

    counts: torch.Tensor
    """int64 [num_layers]; [num_layers * num_kv_heads] where every head selects for itself."""

    head_floor: int | torch.Tensor
    """Of a layer's entries, those that each of its heads has at least: 0 or int64 [num_layers]."""


def split_budget(
    method: Method, layer_weights: torch.Tensor, num_kv_heads: int, scored_len: int, mean: int
) -> Split:
    """Divide L * H * mean scored entries over the layers, exactly.

    layer_weights: float32 [num_layers]. mean: scored entries kept per layer and head, b - w.
    A smaller mean never raises a count. Reads nothing back to the host on a GPU.
    """
    num_layers = len(layer_weights)
    if not method.heads_compete:
        # Each head is a layer of its own: a layer's entries are divided by its heads exactly.
        per_head = layer_split(layer_weights, num_layers * mean, scored_len)
        return Split(per_head.repeat_interleave(num_kv_heads), 0)
    cap = num_kv_heads * scored_len
    counts = layer_split(layer_weights, num_layers * num_kv_heads * mean, cap)
    return Split(counts, floor_of(method, counts, num_kv_heads))


def floor_of(method: Method, counts: torch.Tensor, num_kv_heads: int) -> int | torch.Tensor:
    """The head floor of layers where heads compete for `counts` entries, as `Split` has it."""
    given = method.config.head_floor
    units = round((method.head_floor if given is None else given) * HEAD_FLOOR_UNITS)
    return counts * units // (HEAD_FLOOR_UNITS * num_kv_heads) if units else 0
