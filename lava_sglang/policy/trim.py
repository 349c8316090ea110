# SPDX-License-Identifier: Apache-2.0
"""A trim: the selection of a smaller budget, from the entries and scores that a tape still has."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.kernels.select import select
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy.method import Method
from lava_sglang.policy.select import tape_entries
from lava_sglang.policy.sliding import rank_by_lateness
from lava_sglang.policy.split import split_budget


class Trim(NamedTuple):
    """What stays of a tape."""

    places: torch.Tensor  # int64 [num_layers * num_kv_heads * new budget], of the old tape
    offsets: torch.Tensor  # int32 [num_layers * num_kv_heads + 1], of the new tape


def select_fewer(
    method: Method,
    layers: LayerMap,
    scores: torch.Tensor,
    offsets: torch.Tensor,
    layer_weights: torch.Tensor,
    suffix_len: int,
    window_size: int,
    budget: int,
    width: int | None = None,
) -> Trim:
    """What `select_entries` would have kept at a smaller budget, selected from what was kept.

    scores: [num_layers * num_kv_heads * old budget], of `tape_scores`.
    offsets: int32 [num_layers * num_kv_heads + 1], first tape place of each head.
    layer_weights: float32 [full layers], of the scores. suffix_len: N, tokens.
    width: at least the longest piece of a head; N, if answers have not been compressed since.
    The same entries as `select_entries` keeps, ties included: the layer split is monotone in the
    budget. With a head floor whose rounding is not, an entry or two may differ. Reads nothing back
    to the host on a GPU.
    """
    columns = len(offsets) - 1
    num_kv_heads = columns // layers.num_layers
    starts = offsets[:-1].long()
    # Each head's piece as a row: the order in a head is the order of its tokens.
    owner = torch.arange(columns, device=offsets.device).repeat_interleave(
        offsets.diff(), output_size=len(scores)
    )
    place = torch.arange(len(scores), device=offsets.device)
    width = suffix_len if width is None else width
    by_head = torch.full((columns, width), float("-inf"), device=offsets.device)
    by_head[owner, place - starts[owner]] = scores.float()
    rank_by_lateness(layers, by_head.view(layers.num_layers, num_kv_heads, width))
    counts, floor = split_budget(
        method, layers, layer_weights, num_kv_heads, suffix_len - window_size, window_size, budget
    )
    by_head = by_head.view(len(counts), -1, width)
    if isinstance(floor, torch.Tensor):
        floor = floor + window_size
    kept = select(by_head, counts + by_head.shape[1] * window_size, budget, 0, 0, floor)
    owner, index = tape_entries(kept)
    return Trim(starts[owner] + index, kept.offsets)
