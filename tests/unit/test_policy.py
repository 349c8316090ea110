# SPDX-License-Identifier: Apache-2.0
"""Every method against the oracle's definition of it."""

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.config import KVCompressionConfig
from lava_sglang.methods import COMPETING_METHODS, METHODS, UNIFORM_METHODS
from lava_sglang.policy import Method, PromptView, keep, method_of
from tests.oracle_keep import KEEP, Definition, alike, entropies
from tests.unit.random_prompts import (
    NUM_LAYERS,
    Shape,
    heads_of,
    prefill_of,
    random_prompt,
    small_shapes,
)

NUM_SHAPES = 1000
# Its scores are numbers of a seed: no definition but "a sample", which has tests of its own.
DEFINITIONS = {**KEEP, "random": Definition(lambda layer: layer.values.sum(dim=2))}
READ_THE_PROMPT = ("lava", "lava_span", "snapkv", "adakv", "pyramidkv")


class Options(NamedTuple):
    """Settings that replace a method's own rules."""

    uniform_layers: bool = False
    uniform_heads: bool = False
    head_floor: float | None = None

    def applied_to(self, definition: Definition) -> Definition:
        claims = alike if self.uniform_layers else definition.claims
        if not definition.heads_compete or self.uniform_heads:
            return dataclasses.replace(definition, claims=claims, heads_compete=False)
        given = self.head_floor
        floor = definition.head_floor if given is None else Fraction(str(given))
        return dataclasses.replace(definition, claims=claims, head_floor=floor)


NO_OPTIONS = Options()


SHAPES = [
    Shape(40, 0, 4, 4, 2, 1, 7, 12),
    Shape(40, 9, 4, 4, 2, 3, 7, 12),
    Shape(37, 0, 8, 8, 3, 5, 3, 9),
    Shape(37, 16, 4, 4, 1, 3, 1, 20),
    Shape(37, 5, 8, 3, 2, 5, 5, 17),
    Shape(24, 0, 1, 1, 4, 1, 7, 23),
    Shape(25, 20, 4, 2, 1, 1, 63, 5),
]


OPTIONS = st.builds(
    Options,
    uniform_layers=st.booleans(),
    uniform_heads=st.booleans(),
    head_floor=st.none() | st.sampled_from([0.0, 0.2, 0.29, 0.5, 0.999, 1.0]),
)


def settings_for(
    shape: Shape, method: str = "snapkv", seed: int = 0, options: Options = NO_OPTIONS
) -> KVCompressionConfig:
    """A head floor is left out where it is refused."""
    competing = method in COMPETING_METHODS and not options.uniform_heads
    return KVCompressionConfig(
        method=method,
        window_size=shape.window_size,
        pool_width=shape.pool_width,
        seed=seed,
        uniform_layers=options.uniform_layers,
        uniform_heads=options.uniform_heads,
        head_floor=options.head_floor if competing else None,
    )


def with_window(chosen: torch.Tensor, prompt: PromptView) -> list[list[list[int]]]:
    """[num_layers][num_kv_heads][kept], positions in the prompt, of the oracle's choice."""
    prompt_len = len(prompt.slots)
    window = list(range(prompt_len - prompt.window_size, prompt_len))
    return [
        [(head.nonzero().flatten() + prompt.shared_prefix_len).tolist() + window for head in layer]
        for layer in chosen
    ]


def scores_by_definition(name: str, prompt: PromptView, pool_width: int) -> torch.Tensor:
    """Float64 [num_layers, num_kv_heads, scored tokens]."""
    prefill = prefill_of(prompt)
    return KEEP[name].score(prefill, prompt.shared_prefix_len, prompt.window_size, pool_width)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny ops: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture(params=METHODS)
def method_name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.mark.parametrize("name", READ_THE_PROMPT)
def test_scores_equal_their_definition(name: str, shape: Shape) -> None:
    prompt = random_prompt(shape)
    scores = method_of(settings_for(shape, name)).score(prompt)
    expected = scores_by_definition(name, prompt, shape.pool_width)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


def test_lavas_layer_weights_are_the_entropies_of_its_scores(shape: Shape) -> None:
    method = method_of(settings_for(shape, "lava"))
    scores = method.score(random_prompt(shape))
    assert method.layer_weights(scores).tolist() == pytest.approx(entropies(scores), rel=1e-5)


@pytest.mark.parametrize("num_layers", [2, 3, 30])
def test_pyramidkvs_layer_weights_fall_to_a_twentieth_of_the_mean(num_layers: int) -> None:
    method = method_of(KVCompressionConfig(method="pyramidkv"))
    weights = method.layer_weights(torch.rand(num_layers, 2, 10)).tolist()
    mean = sum(weights) / num_layers
    assert weights[-1] == pytest.approx(mean / 20, rel=1e-5)
    steps = [above - below for above, below in pairwise(weights)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-4) and steps[0] > 0


@pytest.mark.parametrize("name", ["lava_span", "snapkv", "adakv", "streamingllm", "random"])
def test_other_methods_weigh_layers_alike(name: str) -> None:
    weights = method_of(KVCompressionConfig(method=name)).layer_weights(torch.rand(4, 2, 10))
    assert weights.tolist() == [1.0] * 4


@settings(max_examples=NUM_SHAPES, deadline=None, derandomize=True)
@given(
    shape=small_shapes(),
    options=OPTIONS,
    num_layers=st.integers(1, 3),
    distinct=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_every_method_keeps_what_its_definition_keeps(
    shape: Shape, options: Options, num_layers: int, distinct: int | None, seed: int
) -> None:
    """Step by step, each from the step before as it was rounded: scores and layer weights to
    float32's rounding, then the kept entries exactly, ties included."""
    prompt = random_prompt(shape, seed, num_layers, distinct)
    mean = shape.budget - shape.window_size
    for name in METHODS:
        definition = options.applied_to(DEFINITIONS[name])
        method = method_of(settings_for(shape, name, seed, options))
        scores = method.score(prompt)
        if name in READ_THE_PROMPT:
            expected_scores = scores_by_definition(name, prompt, shape.pool_width)
            torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-7)
        weights = method.layer_weights(scores).tolist()
        claims = DEFINITIONS[name].claims(scores)
        assert weights == pytest.approx(claims, rel=1e-5, abs=1e-6)
        kept = keep(method, prompt, shape.budget)
        claims = [1.0] * num_layers if options.uniform_layers else weights
        expected = definition.choose(scores, claims, num_layers * mean)
        assert heads_of(kept, prompt) == with_window(expected, prompt), name
        assert len(kept.tape_tokens) == num_layers * shape.num_kv_heads * shape.budget
        again = keep(method, prompt, shape.budget)
        assert all(torch.equal(*parts) for parts in zip(kept, again, strict=True)), name


@pytest.mark.parametrize("name", READ_THE_PROMPT)
def test_what_is_kept_is_the_best_by_definition(name: str, shape: Shape) -> None:
    """By the sum of what is kept: the oracle rounds otherwise, so near ties may differ."""
    prompt = random_prompt(shape, seed=1)
    kept = heads_of(keep(method_of(settings_for(shape, name)), prompt, shape.budget), prompt)
    scores = scores_by_definition(name, prompt, shape.pool_width)
    mean = shape.budget - shape.window_size
    chosen = KEEP[name].choose(scores, KEEP[name].claims(scores), NUM_LAYERS * mean)
    best = with_window(chosen, prompt)
    for layer, (chosen, expected) in enumerate(zip(kept, best, strict=True)):
        assert layer_value(scores[layer], chosen, prompt) == pytest.approx(
            layer_value(scores[layer], expected, prompt), rel=1e-5
        )


def layer_value(scores: torch.Tensor, kept: list[list[int]], prompt: PromptView) -> float:
    return sum(
        float(head[token - prompt.shared_prefix_len])
        for head, tokens in zip(scores, kept, strict=True)
        for token in tokens[: len(tokens) - prompt.window_size]
    )


@pytest.mark.parametrize("name", ["adakv", "lava_span"])
def test_every_head_keeps_a_fifth_of_the_mean(name: str) -> None:
    """Where one head outscores all others."""
    shape = Shape(108, 0, 8, 8, 4, 1, 1, 33)

    config = settings_for(shape, name)

    class Loud(type(method_of(config))):  # type: ignore[misc]
        def score(self, prompt: PromptView) -> torch.Tensor:
            scores = torch.rand(prompt.num_layers, prompt.num_kv_heads, prompt.scored_len)
            scores[:, 1] += 10
            return scores

    kept = keep(Loud(config), random_prompt(shape), shape.budget)
    assert (kept.counts - shape.window_size).tolist() == [[5, 85, 5, 5]] * NUM_LAYERS


def test_lava_gives_more_to_layers_whose_scores_are_spread() -> None:
    """Layers attend more sharply the higher they are."""
    shape = Shape(200, 0, 2, 2, 2, 1, 1, 50)
    prompt = random_prompt(shape)._replace(scaling=torch.tensor([0.0, 1.0, 5.0]))
    kept = keep(method_of(settings_for(shape, "lava")), prompt, shape.budget)
    flat, sharp, sharpest = kept.counts.sum(dim=1).tolist()
    assert flat > sharp > sharpest


def test_streamingllm_keeps_sinks_then_the_most_recent(shape: Shape) -> None:
    method = method_of(settings_for(shape, "streamingllm"))
    prompt = random_prompt(shape)
    kept = heads_of(keep(method, prompt, shape.budget), prompt)
    scored = shape.prompt_len - shape.shared_prefix_len - shape.window_size
    count = shape.budget - shape.window_size
    sinks = min(4, count, scored)
    places = [*range(sinks), *range(scored - (count - sinks), scored)]
    expected = [shape.shared_prefix_len + place for place in places]
    expected += range(shape.prompt_len - shape.window_size, shape.prompt_len)
    assert kept == [[expected] * shape.num_kv_heads] * NUM_LAYERS


@pytest.mark.parametrize("sink_tokens", [0, 1, 7, 10_000])
def test_streamingllm_takes_as_many_sinks_as_it_is_told(sink_tokens: int) -> None:
    settings = KVCompressionConfig(method="streamingllm", window_size=2, sink_tokens=sink_tokens)
    prompt = random_prompt(SHAPES[0])._replace(window_size=2)
    kept = heads_of(keep(method_of(settings), prompt, 12), prompt)
    sinks = min(sink_tokens, 10)
    assert kept[0][0] == [*range(sinks), *range(38 - (10 - sinks), 40)]


def test_random_keeps_a_seeded_sample(shape: Shape) -> None:
    prompt = random_prompt(shape)
    first = method_of(settings_for(shape, "random", seed=1)).score(prompt)
    again = method_of(settings_for(shape, "random", seed=1)).score(prompt)
    other = method_of(settings_for(shape, "random", seed=2)).score(prompt)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < 1


def test_random_is_spread_evenly() -> None:
    shape = Shape(10_008, 0, 8, 8, 1, 1, 7, 1008)
    prompt = random_prompt(shape, num_layers=1)
    kept = keep(method_of(settings_for(shape, "random")), prompt, shape.budget)
    quarters = torch.histc(kept.tape_tokens[:1000].float(), bins=4, min=0, max=10_000)
    assert quarters.min() > 200 and quarters.max() < 300


@pytest.mark.parametrize("num_layers", [1, NUM_LAYERS])
def test_every_method_keeps_exactly_the_budget_with_its_window(
    method_name: str, shape: Shape, num_layers: int
) -> None:
    """Invariant 6: the kept entries of all layers and heads are L * H * b."""
    prompt = random_prompt(shape, num_layers=num_layers)
    method = method_of(settings_for(shape, method_name))
    kept = keep(method, prompt, shape.budget)
    assert len(kept.tape_tokens) == num_layers * shape.num_kv_heads * shape.budget
    window = list(range(shape.prompt_len - shape.window_size, shape.prompt_len))
    for head in (head for layer in heads_of(kept, prompt) for head in layer):
        assert head == sorted(set(head))  # ascending, none twice
        assert head[0] >= shape.shared_prefix_len
        assert head[-shape.window_size :] == window


@pytest.mark.parametrize("name", UNIFORM_METHODS)
def test_uniform_methods_keep_as_many_everywhere(name: str, shape: Shape) -> None:
    kept = keep(method_of(settings_for(shape, name)), random_prompt(shape), shape.budget)
    assert kept.counts.tolist() == [[shape.budget] * shape.num_kv_heads] * NUM_LAYERS


@pytest.mark.parametrize("name", ["adakv", "lava_span"])
def test_some_methods_split_no_budget_between_layers(name: str, shape: Shape) -> None:
    method = method_of(settings_for(shape, name))
    kept = keep(method, random_prompt(shape), shape.budget)
    assert kept.counts.sum(dim=1).tolist() == [shape.num_kv_heads * shape.budget] * NUM_LAYERS


def test_pyramidkv_keeps_as_many_in_every_head_of_a_layer_and_fewer_above(shape: Shape) -> None:
    method = method_of(settings_for(shape, "pyramidkv"))
    counts = keep(method, random_prompt(shape), shape.budget).counts
    assert (counts == counts[:, :1]).all() and (counts.diff(dim=0) <= 0).all()


def test_every_method_is_deterministic(method_name: str, shape: Shape) -> None:
    method = method_of(settings_for(shape, method_name))
    first, again = (keep(method, random_prompt(shape), shape.budget) for _ in range(2))
    assert all(torch.equal(*parts) for parts in zip(first, again, strict=True))


def test_every_method_scores_what_is_before_the_window(method_name: str, shape: Shape) -> None:
    prompt = random_prompt(shape)
    scores = method_of(settings_for(shape, method_name)).score(prompt)
    scored = shape.prompt_len - shape.shared_prefix_len - shape.window_size
    assert scores.dtype == torch.float32 and prompt.scored_len == scored
    assert scores.shape == (NUM_LAYERS, shape.num_kv_heads, scored)


def test_a_smaller_budget_keeps_a_subset(method_name: str) -> None:
    shape = SHAPES[1]
    prompt = random_prompt(shape)
    method = method_of(settings_for(shape, method_name))
    smaller, larger = (heads_of(keep(method, prompt, budget), prompt) for budget in (9, 20))
    for layer in range(NUM_LAYERS):
        for head in range(shape.num_kv_heads):
            assert set(smaller[layer][head]) <= set(larger[layer][head])


@pytest.mark.parametrize("name", READ_THE_PROMPT)
def test_scales_of_stored_entries_change_no_choice(name: str, shape: Shape) -> None:
    """K's scale is a factor of the logits; V's is one of all scores of its layer, which compete
    with each other only. Powers of two, which round nothing."""
    prompt = random_prompt(shape)
    scales = torch.tensor([[0.5, 4.0], [1.0, 0.25], [8.0, 2.0]])[:, :, None, None, None]
    assert prompt.scaling is not None
    stored = prompt._replace(
        arena=prompt.arena / scales, scaling=prompt.scaling * scales[:, 0, 0, 0, 0]
    )
    method = method_of(settings_for(shape, name))
    ours, theirs = (keep(method, one, shape.budget) for one in (stored, prompt))
    assert all(torch.equal(*parts) for parts in zip(ours, theirs, strict=True))


class Equal(Method):
    """Everything ties."""

    def score(self, prompt: PromptView) -> torch.Tensor:
        return torch.zeros(prompt.num_layers, prompt.num_kv_heads, prompt.scored_len)


class EqualWithFloor(Equal):
    head_floor = 0.2


@pytest.mark.parametrize(
    ("method", "name"), [(Equal, "snapkv"), (Equal, "lava"), (EqualWithFloor, "adakv")]
)
def test_ties_go_to_the_lower_head_and_token(shape: Shape, method: type[Method], name: str) -> None:
    prompt = random_prompt(shape)
    kept = heads_of(keep(method(settings_for(shape, name)), prompt, shape.budget), prompt)
    ties = torch.zeros(NUM_LAYERS, shape.num_kv_heads, prompt.scored_len)
    total = NUM_LAYERS * (shape.budget - shape.window_size)
    expected = KEEP[name].choose(ties, [1.0] * NUM_LAYERS, total)
    assert kept == with_window(expected, prompt)


def test_a_method_is_the_class_of_its_line_in_its_own_file(method_name: str) -> None:
    method = method_of(KVCompressionConfig(method=method_name))
    assert type(method).__module__ == f"lava_sglang.policy.{method_name}"


def test_a_layer_weighs_otherwise_only_where_the_table_says_so(method_name: str) -> None:
    weights = method_of(KVCompressionConfig(method=method_name)).layer_weights(
        torch.rand(3, 2, 10) ** torch.tensor([1, 4, 16])[:, None, None]
    )
    assert (weights.unique().numel() > 1) is METHODS[method_name].layers_differ


def test_only_methods_that_read_queries_ask_for_them(method_name: str, shape: Shape) -> None:
    method = method_of(settings_for(shape, method_name))
    blind = random_prompt(shape)._replace(queries=None)
    if method.needs_queries:
        with pytest.raises(AssertionError):
            method.score(blind)
    else:
        assert torch.equal(method.score(blind), method.score(random_prompt(shape)))


def test_a_method_is_frozen(method_name: str) -> None:
    method = method_of(KVCompressionConfig(method=method_name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.config = KVCompressionConfig()  # type: ignore[misc]
