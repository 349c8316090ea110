# SPDX-License-Identifier: Apache-2.0
"""The public ops on CPU tensors, and the references against formulas written out."""

import math
import re
from pathlib import Path

import pytest
import torch

from lava_sglang.kernels import reference
from lava_sglang.kernels.compact import compact
from lava_sglang.kernels.layer_split import layer_entropy, layer_split
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode
from lava_sglang.kernels.reference import ragged_decode_ref
from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.kernels.select import select
from lava_sglang.kernels.window_scores import window_scores
from tests.kernels.round_trip import Ops, check_round_trip
from tests.kernels.tape_batch import Request, tape_batch

CPU = Ops(window_scores, layer_entropy, layer_split, select, compact, ragged_decode)


@pytest.mark.parametrize("head_floor", [0, 6])
@pytest.mark.parametrize("seed", range(5))
def test_round_trip(seed: int, head_floor: int) -> None:
    check_round_trip(CPU, head_floor=head_floor, seed=seed)


def test_decode_writes_the_output_it_is_given() -> None:
    batch = tape_batch([Request(3, 4, 5)], padding_rows=1)
    workspace = DecodeWorkspace(2, 8, 2, 64, "cpu")
    args = (batch.q, batch.arena, 1, batch.tables(), batch.scaling)
    out = torch.empty_like(batch.q)
    assert ragged_decode(*args, out, workspace=workspace) is out
    assert torch.equal(out, ragged_decode_ref(*args))


def test_even_tape_is_the_stock_layout() -> None:
    """With b entries in every head, place by place, decode reads the row as SGLang would."""
    batch = tape_batch([Request(5, 12, 3, "even")], dtype=torch.float32)
    args = (batch.q, batch.arena, 1, batch.tables(), batch.scaling)
    ragged = ragged_decode_ref(*args)
    batch.budgets.zero_()
    assert torch.equal(batch.budgets, torch.zeros_like(batch.budgets))
    torch.testing.assert_close(ragged, ragged_decode_ref(*args), rtol=0, atol=1e-6)


def test_copy_entry_by_entry() -> None:
    layers, heads, budget, prompt_len = 3, 2, 5, 17
    g = torch.Generator().manual_seed(0)
    arena = torch.randn(layers, 2, 40, heads, 16, generator=g)
    slots = torch.randperm(40, generator=g)
    src, dst = slots[:prompt_len], slots[prompt_len : prompt_len + budget]
    offsets = torch.tensor([0, 0, 7, 8, 20, 29, 30], dtype=torch.int32)
    tokens = torch.randint(0, prompt_len, (30,), generator=g, dtype=torch.int32)
    want = arena.clone()
    for place in range(30):
        owner = max(c for c in range(6) if offsets[c] <= place)
        at = (place // (heads * budget), dst[place % budget], place % (heads * budget) // budget)
        for kv in range(2):
            entry = arena[owner // heads, kv, src[tokens[place]], owner % heads]
            want[at[0], kv, at[1], at[2]] = entry
    compact(arena, src, dst, tokens, offsets)
    assert torch.equal(arena, want)


@pytest.mark.parametrize("group_reduce", ["max", "mean"])
def test_scores_term_by_term(group_reduce: str) -> None:
    layers, heads, group, prefix, window, queries, prompt_len = 2, 2, 2, 4, 5, 3, 20
    g = torch.Generator().manual_seed(0)
    arena = torch.randn(layers, 2, 30, heads, 16, generator=g, dtype=torch.float32)
    q = torch.randn(layers, queries, heads * group, 16, generator=g)
    slots = torch.randperm(30, generator=g)[:prompt_len]
    got = window_scores(
        q, arena, slots, prefix, window, 0.3, ScoreOptions(pool_width=3, group_reduce=group_reduce)
    )
    first, last = prefix, prompt_len - window
    for layer in range(layers):
        for head in range(heads):
            keys, values = arena[layer, :, slots, head].tolist()
            norm = max(sum(abs(x) for x in values[i]) for i in range(first, last))
            by_query_head = []
            for g_head in range(head * group, (head + 1) * group):
                mean = [0.0] * prompt_len
                for t in range(queries):
                    seen = prompt_len - queries + t + 1
                    query = q[layer, t, g_head].tolist()
                    exps = [
                        math.exp(0.3 * sum(a * b for a, b in zip(query, key, strict=True)))
                        for key in keys[:seen]
                    ]
                    for i in range(seen):
                        mean[i] += exps[i] / sum(exps) / queries
                by_query_head.append(
                    [max(mean[max(i - 1, first) : min(i + 2, last)]) for i in range(first, last)]
                )
            reduce = max if group_reduce == "max" else lambda column: sum(column) / group
            want = [reduce(column) * norm for column in zip(*by_query_head, strict=True)]
            torch.testing.assert_close(got[layer, head], torch.tensor(want), rtol=1e-4, atol=0)


def test_every_op_finds_its_cpu_form_by_one_rule() -> None:
    """kernels/README.md states it."""
    rule = re.compile(r"(\w+)_triton(?:\(\w+\))? if \w+\.is_cuda else (?:\1_ref|_on_cpu)\b")
    for path in Path(reference.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            assert "is_cuda" not in line or rule.search(line), (path.name, line)
