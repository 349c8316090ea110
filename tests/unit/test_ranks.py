# SPDX-License-Identifier: Apache-2.0
"""A choice under tensor parallelism: each rank sees its own heads, and fills as many slots."""

import pytest
import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.methods import METHODS
from lava_sglang.policy import Method, PromptView, keep, method_of

NUM_LAYERS, KV_HEADS, GROUP, HEAD_DIM = 3, 4, 6, 8
PROMPT_LEN, SHARED_PREFIX, WINDOW, BUDGET = 60, 9, 4, 12


def method_named(name: str) -> Method:
    return method_of(KVCompressionConfig(method=name, window_size=WINDOW))


@pytest.fixture
def prompt() -> PromptView:
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * GROUP
    return PromptView(
        arena=torch.randn(NUM_LAYERS, 2, PROMPT_LEN, KV_HEADS, HEAD_DIM, generator=generator),
        slots=torch.arange(PROMPT_LEN),
        layers=LayerMap.plain(NUM_LAYERS),
        queries=torch.randn(NUM_LAYERS, WINDOW, heads, HEAD_DIM, generator=generator),
        scaling=torch.full((NUM_LAYERS,), HEAD_DIM**-0.5),
        shared_prefix_len=SHARED_PREFIX,
        window_size=WINDOW,
    )


def view_of(prompt: PromptView, rank: int, tp_size: int) -> PromptView:
    """The prompt on one rank, as SGLang divides it: a share of the query heads, and the KV heads
    that they read. With more ranks than KV heads several ranks hold the same one."""
    assert prompt.queries is not None
    first = rank * KV_HEADS // tp_size
    own = slice(first, first + max(1, KV_HEADS // tp_size))
    return prompt._replace(
        arena=prompt.arena[:, :, :, own].contiguous(),
        queries=prompt.queries.chunk(tp_size, dim=2)[rank].contiguous(),
    )


def kept_entries(method: Method, prompt: PromptView) -> torch.Tensor:
    """bool [num_layers, num_kv_heads, prompt_len], of a tape that `keep` filled to the end."""
    kept = keep(method, prompt, BUDGET)
    columns = prompt.num_layers * prompt.num_kv_heads
    assert kept.offsets[0] == 0 and kept.offsets[-1] == len(kept.tape_tokens) == columns * BUDGET
    entries = torch.zeros(columns, PROMPT_LEN, dtype=torch.bool)
    owner = torch.arange(columns).repeat_interleave(kept.counts.flatten())
    entries[owner, kept.tape_tokens.long()] = True
    assert entries.sum() == columns * BUDGET
    return entries.view(prompt.num_layers, prompt.num_kv_heads, PROMPT_LEN)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 24])
@pytest.mark.parametrize("name", METHODS)
def test_every_rank_fills_as_many_slots(prompt: PromptView, name: str, tp_size: int) -> None:
    """BUDGET of them, also on ranks that share a KV head: `kept_entries` counts."""
    for rank in range(tp_size):
        kept = kept_entries(method_named(name), view_of(prompt, rank, tp_size))
        assert kept[:, :, -WINDOW:].all() and not kept[:, :, :SHARED_PREFIX].any()


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", sorted({*METHODS} - {"random"}))
def test_only_methods_that_compare_heads_choose_otherwise(
    prompt: PromptView, name: str, tp_size: int
) -> None:
    """The others choose in each head by itself, wherever it is."""
    method = method_named(name)
    on_ranks = [kept_entries(method, view_of(prompt, rank, tp_size)) for rank in range(tp_size)]
    alike = torch.equal(torch.cat(on_ranks, dim=1), kept_entries(method, prompt))
    assert alike is not method.heads_compete


def test_ranks_that_share_a_kv_head_choose_by_their_own_queries(prompt: PromptView) -> None:
    """They need not agree: each reads its own copy of the head."""
    first, second = (
        kept_entries(method_named("snapkv"), view_of(prompt, rank, 8)) for rank in (0, 1)
    )
    assert not torch.equal(first, second)


def test_a_rank_of_padded_heads_keeps_as_many(prompt: PromptView) -> None:
    """SGLang's CPU engine pads heads with zero weights: keys, values and queries are 0."""
    empty = prompt._replace(
        arena=torch.zeros_like(prompt.arena), queries=torch.zeros_like(prompt.queries)
    )
    for name in METHODS:
        kept = kept_entries(method_named(name), empty)
        assert kept[:, :, -WINDOW:].all()
