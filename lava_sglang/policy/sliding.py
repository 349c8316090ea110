# SPDX-License-Identifier: Apache-2.0
"""Sliding layers keep their last tokens, and leave the rest of the budget to the full layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.layer_map import LayerMap


class Shares(NamedTuple):
    """Scored entries of one head: how many stay in its layers."""

    full: int  # of all full layers together
    sliding: int  # of each sliding layer
    extra: int  # sliding layers, the lowest, that keep one more


def share_out(
    layers: LayerMap, ragged: bool, window_size: int, scored_len: int, mean: int
) -> Shares:
    """Divide num_layers * mean scored entries of a head between full and sliding layers, exactly.

    ragged: whether layers may keep different numbers. Sliding layers then get what they read and no
    more, as long as full ones have anything to keep. A smaller mean raises nothing.
    """
    total, count = layers.num_layers * mean, len(layers.sliding)
    if not count:
        return Shares(total, 0, 0)
    if not ragged:
        return Shares(len(layers.full) * mean, mean, 0)
    needed = count * (layers.sliding_kept(window_size) - window_size)
    full = min(len(layers.full) * scored_len, total - needed)
    return Shares(full, *divmod(total - full, count))


def with_sliding_counts(
    layers: LayerMap, counts: torch.Tensor, shares: Shares, heads: int
) -> torch.Tensor:
    """Scored entries of every layer, of `heads` heads together. counts: int64 [full layers], of
    the full ones. Returns int64 [num_layers]."""
    if not layers.sliding:
        return counts
    everywhere = counts.new_empty(layers.num_layers)
    everywhere[layers.full_index] = counts
    places = torch.arange(len(layers.sliding), device=counts.device)
    everywhere[layers.sliding_index] = heads * (shares.sliding + (places < shares.extra).long())
    return everywhere


def with_sliding_scores(layers: LayerMap, scores: torch.Tensor) -> torch.Tensor:
    """Scores of every layer's entries: in a sliding layer, the later the higher.

    scores: float32 [full layers, num_kv_heads, tokens]. Returns float32 [num_layers, num_kv_heads,
    tokens].
    """
    if not layers.sliding:
        return scores
    everywhere = scores.new_empty(layers.num_layers, *scores.shape[1:])
    everywhere[layers.full_index] = scores
    everywhere[layers.sliding_index] = torch.arange(
        scores.shape[2], dtype=scores.dtype, device=scores.device
    )
    return everywhere


def rank_by_lateness(layers: LayerMap, scores: torch.Tensor) -> None:
    """In sliding layers an entry scores the higher the later it comes, whatever it scored; infinite
    scores stay. scores: float32 [num_layers, num_kv_heads, places], mutated."""
    if not layers.sliding:
        return
    own = scores[layers.sliding_index]
    lateness = torch.arange(scores.shape[2], dtype=scores.dtype, device=scores.device)
    scores[layers.sliding_index] = own.where(own.isinf(), lateness)
