# SPDX-License-Identifier: Apache-2.0
"""A prompt through all five ops, against attention over the exact prompt under a keep mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.ragged_decode import DecodeWorkspace
from tests.kernels.device import generator


class Ops(NamedTuple):
    window_scores: Callable[..., Any]
    layer_entropy: Callable[..., Any]
    layer_split: Callable[..., Any]
    select: Callable[..., Any]
    compact: Callable[..., Any]
    ragged_decode: Callable[..., Any]


def check_round_trip(ops: Ops, *, head_floor: int = 0, seed: int = 0) -> None:
    layers, heads, group, head_dim = 3, 2, 3, 64
    prefix, suffix, window, budget, tail = 13, 90, 8, 30, 4
    prompt_len, scaling = prefix + suffix, head_dim**-0.5
    g = generator(seed)
    slots = torch.randperm(200, generator=g) + 1
    arena = torch.randn(layers, 2, 201, heads, head_dim, generator=g)
    queries = 3 * torch.randn(layers, window, heads * group, head_dim, generator=g)
    prompt, tape, tail_slots = slots.split([prompt_len, budget, 200 - prompt_len - budget])
    tail_slots = tail_slots[:tail]
    exact = arena.clone()

    scores = ops.window_scores(queries, arena, prompt, prefix, window, scaling)
    scored = heads * (suffix - window)
    total = layers * heads * (budget - window)
    layer_counts = ops.layer_split(ops.layer_entropy(scores), total, scored)
    kept = ops.select(scores, layer_counts, budget, prefix, window, head_floor)
    ops.compact(arena, prompt, tape, kept.tape_tokens, kept.offsets)
    assert kept.counts.sum() == layers * heads * budget
    assert len(set(kept.counts.view(-1).tolist())) > 1, "not a ragged case"

    row = torch.cat([prompt[:prefix], tape, tail_slots])
    # The suffix's exact entries may be overwritten now: nothing reads them.
    arena[:, :, prompt[prefix:]] = float("nan")
    tables = BatchTables(
        req_to_token=torch.stack([torch.zeros_like(row), row]).int(),
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([len(row)]),
        prefix_lens=torch.tensor([0, prefix], dtype=torch.int32),
        budgets=torch.tensor([0, budget], dtype=torch.int32),
        offsets=torch.stack([torch.zeros_like(kept.offsets), kept.offsets]),
    )
    workspace = DecodeWorkspace(
        1,
        heads * group,
        heads,
        head_dim,
        torch.get_default_device(),
        num_programs=8,
        max_splits=4,
        min_chunk=32,
    )
    q = torch.randn(1, heads * group, head_dim, generator=g)
    for layer in range(layers):
        got = ops.ragged_decode(q, arena, layer, tables, scaling, workspace=workspace)
        for head in range(heads):
            first, end = kept.offsets[layer * heads + head :][:2].tolist()
            tokens = kept.tape_tokens[first:end].long()
            assert tokens.tolist() == sorted(set(tokens.tolist()))
            mask = torch.zeros(prompt_len + tail, dtype=torch.bool)
            mask[:prefix] = mask[prompt_len:] = mask[tokens] = True
            k, v = exact[layer, :, torch.cat([prompt, tail_slots]), head]
            own = slice(head * group, (head + 1) * group)
            logits = (q[0, own] @ k.T * scaling).masked_fill(~mask, float("-inf"))
            want = logits.softmax(-1) @ v
            torch.testing.assert_close(got[0, own], want, rtol=0, atol=2e-6)
