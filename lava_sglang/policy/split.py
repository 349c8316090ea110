# SPDX-License-Identifier: Apache-2.0
"""Step 2, split: how many entries each layer keeps, or each head where heads do not compete."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.kernels.layer_split import layer_split
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy.method import Method
from lava_sglang.policy.sliding import share_out, with_sliding_counts

HEAD_FLOOR_UNITS = 1_000_000
"""A head floor is read in so many parts of the mean: whole numbers are alike on every device."""


class Split(NamedTuple):
    """How many scored entries are selected together, without those of the window."""

    counts: torch.Tensor
    """int64 [num_layers]; [num_layers * num_kv_heads] where every head selects for itself."""

    head_floor: int | torch.Tensor
    """Of a layer's entries, those that each of its heads has at least: 0 or int64 [num_layers]."""


def split_budget(
    method: Method,
    layers: LayerMap,
    layer_weights: torch.Tensor,
    num_kv_heads: int,
    scored_len: int,
    window_size: int,
    budget: int,
) -> Split:
    """Divide L * H * (b - w) scored entries over the layers, exactly.

    layer_weights: float32 [full layers]. budget: b, entries kept per layer and head.
    A smaller budget never raises a count. Reads nothing back to the host on a GPU.
    """
    ragged = method.traits.ragged
    shares = share_out(layers, ragged, window_size, scored_len, budget - window_size)
    # Where heads do not compete each is a layer of its own: a layer's entries are divided by its
    # heads exactly.
    heads = num_kv_heads if method.heads_compete else 1
    counts = layer_split(layer_weights, heads * shares.full, heads * scored_len)
    counts = with_sliding_counts(layers, counts, shares, heads)
    if not method.heads_compete:
        return Split(counts.repeat_interleave(num_kv_heads), 0)
    return Split(counts, floor_of(method, counts, num_kv_heads))


def floor_of(method: Method, counts: torch.Tensor, num_kv_heads: int) -> int | torch.Tensor:
    """The head floor of layers where heads compete for `counts` entries, as `Split` has it."""
    given = method.config.head_floor
    units = round((method.head_floor if given is None else given) * HEAD_FLOOR_UNITS)
    return counts * units // (HEAD_FLOOR_UNITS * num_kv_heads) if units else 0
