# SPDX-License-Identifier: Apache-2.0
"""A long answer: the selection of the same budget, from a tape and the answer behind it."""

from __future__ import annotations

import torch

from lava_sglang.kernels.select import Selection, select
from lava_sglang.policy.method import Method
from lava_sglang.policy.split import floor_of


def select_again(
    method: Method, scores: torch.Tensor, offsets: torch.Tensor, window_size: int, budget: int
) -> Selection:
    """A tape of the same budget, selected from what was kept and from the answer since.

    scores: float32 [num_layers, num_kv_heads, places], of `tail_scores`. offsets: int32
    [num_layers * num_kv_heads + 1], of the old tape. Layers keep as many entries as they had; where
    the method's heads compete, they do so again. In the result a token is an index into `places`.
    Reads nothing back to the host on a GPU.
    """
    num_layers, num_kv_heads, places = scores.shape
    counts = offsets.diff().long()
    floor: int | torch.Tensor = 0
    if method.heads_compete:
        counts = counts.view(num_layers, num_kv_heads).sum(dim=1)
        floor = floor_of(method, counts - num_kv_heads * window_size, num_kv_heads)
    if isinstance(floor, torch.Tensor):
        floor = floor + window_size
    return select(scores.view(len(counts), -1, places), counts, budget, 0, 0, floor)
