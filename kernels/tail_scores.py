# SPDX-License-Identifier: Apache-2.0
"""Scores a compressed request's entries again, by the queries of its last decode steps.

Plain torch on any device, one layer at a time: it runs once in hundreds of decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lava_sglang.kernels.reference import importance_ref, window_attention_ref
from lava_sglang.kernels.score_options import LAVA, ScoreOptions
from lava_sglang.kernels.trim import own_rows, tape_rows


def tail_scores(
    queries: torch.Tensor,
    arena: torch.Tensor,
    prefix_slots: torch.Tensor,
    tape_slots: torch.Tensor,
    offsets: torch.Tensor,
    tail_slots: torch.Tensor,
    scaling: torch.Tensor,
    width: int,
    options: ScoreOptions = LAVA,
    *,
    layers: Sequence[int] | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Importance of the entries on the tape and of those in the tail.

    queries: [scored layers, window, num_qo_heads, head_dim], after RoPE, of the last tail tokens.
    layers: the arena's layer of each of the queries', in order; None: all. In the other layers an
    entry scores the higher the later it comes.
    arena: [num_layers, 2, slots, num_kv_heads, head_dim] in the queries' dtype or fp8.
    prefix_slots, tape_slots, tail_slots: int64, row[:P], row[P : P + b] and the rest of the row.
    offsets: int32 [num_layers * num_kv_heads + 1], first tape place of each head.
    scaling: float32 [scored layers], with the k_scale of an fp8 arena. logit_cap: as of
    `reference.capped_ref`. width: at least the longest piece of a head. options: how attention
    becomes a score.
    Returns float32 [num_layers, num_kv_heads, width + tail]: a head's piece up to `width` and its
    tail from there, neighbours as in the row; -inf where a head has no entry, inf in the window.
    Reads nothing back to the host.
    """
    window = queries.shape[1]
    num_layers, _, _, num_kv_heads, head_dim = arena.shape
    of_layer = {layer: i for i, layer in enumerate(range(num_layers) if layers is None else layers)}
    prefix_len, tail_len = len(prefix_slots), len(tail_slots)
    rows = arena.view(-1, head_dim)
    v_plane = arena.shape[2] * num_kv_heads
    starts, ends = (o.long().view(num_layers, num_kv_heads) for o in (offsets[:-1], offsets[1:]))
    before_tail = torch.arange(width, device=arena.device)[:, None] - width
    lateness = torch.arange(width + tail_len - window, device=arena.device).float()
    scores = []
    for layer in range(num_layers):
        # [width, num_kv_heads], and K rows of the same shape
        piece = ends[layer] + before_tail
        absent = torch.zeros(
            prefix_len + width + tail_len, num_kv_heads, dtype=torch.bool, device=arena.device
        )
        absent[prefix_len : prefix_len + width] = piece < starts[layer]
        scored = slice(prefix_len, len(absent) - window)
        score = lateness.expand(num_kv_heads, -1)
        if layer in of_layer:
            k_rows = tape_rows(arena, tape_slots, piece.clamp(min=0), len(tape_slots))
            keys, values = (
                torch.cat([own[prefix_slots], rows[piece_rows], own[tail_slots]])
                for own, piece_rows in zip(arena[layer], (k_rows, k_rows + v_plane), strict=True)
            )
            attention = window_attention_ref(
                queries[of_layer[layer]],
                keys,
                scaling[of_layer[layer]],
                logit_cap=logit_cap,
                query_weights=options.query_weights,
                root_mean_square=options.root_mean_square,
                absent=absent.T,
            )
            present = values[scored].float().masked_fill(absent[scored][..., None], 0)
            score = importance_ref(attention[:, scored], present, options)
        score = score.masked_fill(absent[scored].T, float("-inf"))
        scores.append(torch.nn.functional.pad(score, (0, window), value=float("inf")))
    assert tail_len >= window, (tail_len, window)
    return torch.stack(scores)


def tail_rows(
    arena: torch.Tensor,
    tape_slots: torch.Tensor,
    offsets: torch.Tensor,
    tail_slots: torch.Tensor,
    width: int,
    columns: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """K rows of entries that `tail_scores` scored, int64 [n], as `trim.tape_rows` counts them.

    arena to width: as of `tail_scores`. columns: int64 [n], layer * num_kv_heads + head.
    places: int64 [n], of an entry's score among its head's. Reads nothing back to the host.
    """
    piece = (offsets[columns + 1] + places - width).clamp(max=len(columns) - 1)
    in_tail = own_rows(arena, tail_slots[(places - width).clamp(min=0)], columns)
    on_tape = tape_rows(arena, tape_slots, piece, len(tape_slots))
    return torch.where(places < width, on_tape, in_tail)
