# SPDX-License-Identifier: Apache-2.0
"""Checks of `select` that its CPU path and its kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lava_sglang.kernels.layer_split import layer_split
from lava_sglang.kernels.reference import select_ref
from lava_sglang.kernels.select import Selection
from tests.kernels.device import generator

SelectFn = Callable[..., Selection]


def check_selection(
    run: SelectFn,
    scores: torch.Tensor,
    layer_counts: torch.Tensor,
    budget: int,
    window_size: int = 3,
    first_token: int = 5,
    head_floor: int | torch.Tensor = 0,
) -> Selection:
    """Equal to the reference to the entry, and exact in its sum."""
    num_layers, num_kv_heads, _ = scores.shape
    got = run(scores, layer_counts, budget, first_token, window_size, head_floor)
    counts, offsets, tape_tokens = select_ref(
        scores, layer_counts, first_token, window_size, head_floor
    )
    assert got.counts.tolist() == counts.tolist()
    assert got.offsets.tolist() == offsets.tolist()
    assert got.tape_tokens.tolist() == tape_tokens.tolist()
    assert all(t.dtype == torch.int32 for t in got)
    assert len(got.tape_tokens) == num_layers * num_kv_heads * budget == got.offsets[-1]
    return got


def random_problem(
    seed: int,
    *,
    layers: int = 3,
    heads: int = 2,
    tokens: int = 60,
    levels: int | None = None,
    window_size: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(scores, layer_counts, budget); with `levels`, many scores are equal."""
    g = generator(seed)
    scores = torch.rand(layers, heads, tokens, generator=g)
    if levels:
        scores = (scores * levels).floor()
    budget = window_size + int(torch.randint(0, tokens + 1, (1,), generator=g))
    total = layers * heads * (budget - window_size)
    counts = layer_split(torch.rand(layers, generator=g), total, heads * tokens)
    return scores, counts, budget
