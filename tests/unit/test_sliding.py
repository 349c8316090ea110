# SPDX-License-Identifier: Apache-2.0
"""Sliding layers keep what they read, full ones share the rest; the sum is exact all the same."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.methods import METHODS
from lava_sglang.policy import (
    PromptView,
    keep,
    method_of,
    score_prompt,
    select_again,
    select_entries,
    select_fewer,
    tape_scores,
)
from tests.oracle_keep import KEEP
from tests.unit.random_prompts import Shape, heads_of, prefill_of, random_prompt

WINDOW = 4
SLIDING = [0, 1, 3]
LAYERS = 5
REACH = 9  # the sliding window, tokens
SHAPE = Shape(
    prompt_len=70,
    shared_prefix_len=6,
    window_size=WINDOW,
    num_queries=WINDOW,
    num_kv_heads=2,
    group=2,
    pool_width=3,
    budget=20,
)


def sliding_prompt(shape: Shape = SHAPE, reach: int = REACH, seed: int = 0) -> PromptView:
    prompt = random_prompt(shape, seed, LAYERS)
    layers = LayerMap(range(LAYERS), SLIDING, reach)
    full = list(layers.full)
    assert prompt.queries is not None and prompt.scaling is not None
    return prompt._replace(
        layers=layers, queries=prompt.queries[full], scaling=prompt.scaling[full]
    )


def settings_of(name: str, **changes: object) -> KVCompressionConfig:
    values = {"method": name, "window_size": WINDOW, "pool_width": 3, "budget": 20, **changes}
    return KVCompressionConfig.parse(values)


@pytest.mark.parametrize("name", sorted({*KEEP}))
@pytest.mark.parametrize("budget", [10, 13, 20, 30, 45, 60, 63])
def test_full_layers_keep_the_oracles_and_sliding_ones_what_they_read(
    name: str, budget: int
) -> None:
    prompt = sliding_prompt()
    method = method_of(settings_of(name))
    kept = heads_of(keep(method, prompt, budget), prompt)
    plain = random_prompt(SHAPE, 0, LAYERS)
    reach = [REACH if layer in SLIDING else None for layer in range(LAYERS)]
    mask = KEEP[name](replace(prefill_of(plain), reach=reach), 6, budget, WINDOW, 3)
    total = 0
    for layer in range(LAYERS):
        for head in range(SHAPE.num_kv_heads):
            tokens = kept[layer][head]
            total += len(tokens)
            if layer in SLIDING:
                assert len(tokens) >= REACH - 1
                assert tokens == list(range(SHAPE.prompt_len - len(tokens), SHAPE.prompt_len))
            else:
                assert tokens == mask[layer, head, 6:].nonzero().flatten().add(6).tolist()
    assert total == LAYERS * SHAPE.num_kv_heads * budget


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    name=st.sampled_from(sorted(METHODS)),
    reach=st.integers(1, 40),
    window=st.integers(1, 6),
)
def test_every_rung_fits_and_a_smaller_one_keeps_a_subset(
    data: st.DataObject, name: str, reach: int, window: int
) -> None:
    """Of any suffix that is compressed at all, by any window; the last rung is where nothing is
    lost, and there everything that is read is kept."""
    layers = LayerMap(range(LAYERS), SLIDING, reach)
    suffix_len = data.draw(st.integers(max(reach - 1, window + 2), 80))
    prompt_len = suffix_len + 3
    shape = replace_shape(prompt_len=prompt_len, shared_prefix_len=3, window_size=window)
    prompt = sliding_prompt(shape, reach)
    config = settings_of(name, window_size=window, budget=1.0)
    method = method_of(config)
    fewest = layers.fewest_slots(window, config.ragged)
    most = layers.most_slots(suffix_len, window, config.ragged)
    if fewest >= suffix_len:
        return
    before: list[list[set[int]]] | None = None
    for budget in range(min(fewest, most), suffix_len + 1):
        kept = [[set(tokens) for tokens in heads] for heads in tokens_of(prompt, method, budget)]
        if before is not None and config.ragged and method.config.head_floor is None:
            floorless = method.head_floor == 0
            for layer in range(LAYERS):
                for head in range(shape.num_kv_heads):
                    assert not floorless or before[layer][head] <= kept[layer][head]
        before = kept
        for layer in range(LAYERS):
            for tokens in kept[layer]:
                everything = set(range(3, prompt_len))
                last = set(range(prompt_len - min(reach - 1, suffix_len), prompt_len))
                if layer in SLIDING:
                    assert last <= tokens
                elif budget >= most:
                    assert tokens == everything


def replace_shape(**changes: int) -> Shape:
    return SHAPE._replace(**{"num_queries": changes["window_size"], **changes})


def tokens_of(prompt: PromptView, method: object, budget: int) -> list[list[list[int]]]:
    return heads_of(keep(method, prompt, budget), prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lava", "lava_span", "snapkv", "pyramidkv"])
def test_a_trim_keeps_what_the_smaller_budget_keeps_at_once(name: str) -> None:
    prompt = sliding_prompt()
    method = method_of(settings_of(name, budget=(40, 15)))
    scores = score_prompt(method, prompt)
    kept = select_entries(method, scores, prompt, 40)
    fewer = select_fewer(
        method,
        prompt.layers,
        tape_scores(prompt, scores, kept),
        kept.offsets,
        scores.layer_weights,
        64,
        WINDOW,
        15,
    )
    at_once = select_entries(method, scores, prompt, 15)
    assert torch.equal(fewer.offsets, at_once.offsets)
    assert torch.equal(kept.tape_tokens[fewer.places], at_once.tape_tokens)


@pytest.mark.parametrize("name", ["lava", "snapkv"])
def test_of_a_long_answer_a_sliding_layer_keeps_the_last_tokens(name: str) -> None:
    """Tape and tail as `tail_scores` hands them over: pieces end at `width`, the tail follows."""
    prompt = sliding_prompt()
    method = method_of(settings_of(name))
    kept = keep(method, prompt, 20)
    counts, tail, width = kept.counts, 30, 64
    scores = torch.rand(LAYERS, 2, width + tail)
    scores[SLIDING] = torch.arange(width + tail).float()
    scores[:, :, -WINDOW:] = math.inf
    for layer in range(LAYERS):
        for head in range(2):
            scores[layer, head, : width - int(counts[layer, head])] = -math.inf
    again = select_again(method, scores, kept.offsets, WINDOW, 20)
    assert torch.equal(again.counts.view(LAYERS, 2).sum(1), counts.sum(1))
    pieces = again.tape_tokens.split(again.counts.flatten().tolist())
    for layer in SLIDING:
        for piece in pieces[2 * layer : 2 * layer + 2]:
            end = width + tail
            assert piece.tolist() == list(range(end - len(piece), end))


def test_a_plain_model_is_the_identity() -> None:
    layers = LayerMap.plain(4)
    assert [layers.arena_layer(i) for i in range(4)] == [0, 1, 2, 3] == list(layers.full)
    assert [layers.place_among_full(i) for i in range(4)] == [0, 1, 2, 3]
    assert {layers.window_of(i) for i in range(4)} == {0}
    assert layers.fewest_slots(32, True) == 33 and layers.most_slots(500, 32, True) == 500


def test_layers_of_a_model_that_holds_entries_in_some() -> None:
    """SGLang's ids count all layers, the arena's those that hold entries."""
    layers = LayerMap([3, 7, 11], sliding=[1], sliding_window=8)
    assert (layers.num_layers, layers.full, layers.sliding) == (3, (0, 2), (1,))
    assert layers.arena_layer(11) == 2 and layers.place_among_full(11) == 1
    assert layers.place_among_full(7) is None and layers.window_of(7) == 8
    with pytest.raises(KeyError):
        layers.arena_layer(4)
