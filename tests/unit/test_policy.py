# SPDX-License-Identifier: Apache-2.0
"""Every method against a slow reading of its definition, one number at a time."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch

from lava_sglang import config as config_module
from lava_sglang.config import KVCompressionConfig
from lava_sglang.policy import METHODS, LayerView, Method, select

HEAD_DIM = 8
SCALING = HEAD_DIM**-0.5


class Shape(NamedTuple):
    prompt_len: int
    shared_prefix_len: int
    window_size: int
    num_queries: int  # below window_size where the tree's prefix covered part of the window
    num_kv_heads: int
    group: int
    pool_width: int
    budget: int


SHAPES = [
    Shape(40, 0, 4, 4, 2, 1, 7, 12),
    Shape(40, 9, 4, 4, 2, 3, 7, 12),
    Shape(37, 0, 8, 8, 3, 5, 3, 9),
    Shape(37, 16, 4, 4, 1, 3, 1, 20),
    Shape(37, 5, 8, 3, 2, 5, 5, 17),
    Shape(24, 0, 1, 1, 4, 1, 7, 23),
    Shape(25, 20, 4, 2, 1, 1, 63, 5),
]


def settings_for(shape: Shape, method: str = "snapkv", seed: int = 0) -> KVCompressionConfig:
    return KVCompressionConfig(
        method=method, window_size=shape.window_size, pool_width=shape.pool_width, seed=seed
    )


def random_layer(shape: Shape, seed: int = 0) -> LayerView:
    generator = torch.Generator().manual_seed(seed)
    heads = shape.num_kv_heads * shape.group
    return LayerView(
        keys=torch.randn(shape.prompt_len, shape.num_kv_heads, HEAD_DIM, generator=generator),
        queries=torch.randn(shape.num_queries, heads, HEAD_DIM, generator=generator),
        scaling=SCALING,
        shared_prefix_len=shape.shared_prefix_len,
        window_size=shape.window_size,
    )


def snapkv_scores(layer: LayerView, pool_width: int) -> list[list[float]]:
    """SnapKV by its definition, in float64: [num_kv_heads][scored tokens]."""
    assert layer.queries is not None
    num_queries, num_qo_heads, _ = layer.queries.shape
    prompt_len, num_kv_heads, _ = layer.keys.shape
    group = num_qo_heads // num_kv_heads
    first, last = layer.shared_prefix_len, prompt_len - layer.window_size
    queries, keys = layer.queries.double(), layer.keys.double()
    scores = []
    for kv_head in range(num_kv_heads):
        pooled_heads = []
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            mean = [0.0] * prompt_len
            for place in range(num_queries):
                seen = prompt_len - num_queries + place + 1
                weights = [
                    math.exp(float(queries[place, query_head] @ keys[t, kv_head]) * layer.scaling)
                    for t in range(seen)
                ]
                for token, weight in enumerate(weights):
                    mean[token] += weight / sum(weights) / num_queries
            half = pool_width // 2
            pooled_heads.append(
                [
                    max(mean[max(first, t - half) : min(last, t + half + 1)])
                    for t in range(first, last)
                ]
            )
        scores.append([sum(column) / group for column in zip(*pooled_heads, strict=True)])
    return scores


def best_tokens(scores: list[float], layer: LayerView, budget: int) -> list[int]:
    """Positions in the prompt: the best scored tokens, ties to the lower, and the window."""
    count = budget - layer.window_size
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    prompt_len = layer.keys.shape[0]
    window = range(prompt_len - layer.window_size, prompt_len)
    return [layer.shared_prefix_len + token for token in sorted(order[:count])] + list(window)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture(params=METHODS)
def method_name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_snapkv_scores_equal_its_definition(shape: Shape) -> None:
    layer = random_layer(shape)
    scores = METHODS["snapkv"](settings_for(shape)).score(layer)
    expected = torch.tensor(snapkv_scores(layer, shape.pool_width), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


def test_snapkv_keeps_the_best(shape: Shape) -> None:
    """By the sum of what is kept: loops round in another order, so near ties may differ."""
    layers = [random_layer(shape, seed) for seed in (1, 2)]
    kept = select(METHODS["snapkv"](settings_for(shape)), layers, shape.budget)
    for layer, heads in zip(layers, kept.tolist(), strict=True):
        all_scores = snapkv_scores(layer, shape.pool_width)
        for scores, chosen in zip(all_scores, heads, strict=True):
            value = dict(enumerate(scores, start=shape.shared_prefix_len))
            best = best_tokens(scores, layer, shape.budget)
            assert sum(value.get(token, 0) for token in chosen) == pytest.approx(
                sum(value.get(token, 0) for token in best), rel=1e-5
            )


def test_streamingllm_keeps_sinks_then_the_most_recent(shape: Shape) -> None:
    method = METHODS["streamingllm"](settings_for(shape, "streamingllm"))
    layer = random_layer(shape)
    (kept,) = select(method, [layer], shape.budget)
    scored = shape.prompt_len - shape.shared_prefix_len - shape.window_size
    count = shape.budget - shape.window_size
    sinks = min(4, count, scored)
    places = [*range(sinks), *range(scored - (count - sinks), scored)]
    expected = [shape.shared_prefix_len + place for place in places]
    expected += range(shape.prompt_len - shape.window_size, shape.prompt_len)
    assert kept.tolist() == [expected] * shape.num_kv_heads


@pytest.mark.parametrize("sink_tokens", [0, 1, 7, 10_000])
def test_streamingllm_takes_as_many_sinks_as_it_is_told(sink_tokens: int) -> None:
    settings = KVCompressionConfig(method="streamingllm", window_size=2, sink_tokens=sink_tokens)
    layer = random_layer(SHAPES[0])._replace(window_size=2)
    (kept,) = select(METHODS["streamingllm"](settings), [layer], 12)
    sinks = min(sink_tokens, 10)
    assert kept[0].tolist() == [*range(sinks), *range(38 - (10 - sinks), 40)]


def test_random_keeps_a_seeded_sample(shape: Shape) -> None:
    layer = random_layer(shape)
    first = METHODS["random"](settings_for(shape, "random", seed=1)).score(layer)
    again = METHODS["random"](settings_for(shape, "random", seed=1)).score(layer)
    other = METHODS["random"](settings_for(shape, "random", seed=2)).score(layer)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < 1


def test_random_is_spread_evenly() -> None:
    shape = Shape(10_008, 0, 8, 8, 1, 1, 7, 1008)
    layer = random_layer(shape)
    (kept,) = select(METHODS["random"](settings_for(shape, "random")), [layer], shape.budget)
    quarters = torch.histc(kept[0, :1000].float(), bins=4, min=0, max=10_000)
    assert quarters.min() > 200 and quarters.max() < 300


def test_every_method_keeps_exactly_the_budget_with_its_window(
    method_name: str, shape: Shape
) -> None:
    """Invariant 6: the kept entries of every layer and head are b, so L * H * b in all."""
    layers = [random_layer(shape, seed) for seed in range(3)]
    kept = select(METHODS[method_name](settings_for(shape, method_name)), layers, shape.budget)
    assert kept.dtype == torch.int64
    assert kept.shape == (3, shape.num_kv_heads, shape.budget)
    assert kept.numel() == 3 * shape.num_kv_heads * shape.budget
    assert (kept.diff(dim=-1) > 0).all()  # ascending, none twice
    assert kept.min() >= shape.shared_prefix_len and kept.max() == shape.prompt_len - 1
    window = torch.arange(shape.prompt_len - shape.window_size, shape.prompt_len)
    assert (kept[..., -shape.window_size :] == window).all()


def test_every_method_is_deterministic(method_name: str, shape: Shape) -> None:
    method = METHODS[method_name](settings_for(shape, method_name))
    kept = [select(method, [random_layer(shape)], shape.budget) for _ in range(2)]
    assert torch.equal(*kept)


def test_every_method_scores_what_is_before_the_window(method_name: str, shape: Shape) -> None:
    scores = METHODS[method_name](settings_for(shape, method_name)).score(random_layer(shape))
    scored = shape.prompt_len - shape.shared_prefix_len - shape.window_size
    assert scores.dtype == torch.float32
    assert scores.shape == (shape.num_kv_heads, scored)


def test_a_smaller_budget_keeps_a_subset(method_name: str) -> None:
    shape = SHAPES[1]
    method = METHODS[method_name](settings_for(shape, method_name))
    smaller, larger = (select(method, [random_layer(shape)], budget)[0] for budget in (9, 20))
    for head in range(shape.num_kv_heads):
        assert set(smaller[head].tolist()) <= set(larger[head].tolist())


class Equal(Method):
    """Everything ties."""

    def score(self, layer: LayerView) -> torch.Tensor:
        scored = layer.keys.shape[0] - layer.shared_prefix_len - layer.window_size
        return torch.zeros(layer.keys.shape[1], scored)


def test_ties_go_to_the_lower_token(shape: Shape) -> None:
    layer = random_layer(shape)
    (kept,) = select(Equal(settings_for(shape)), [layer], shape.budget)
    scored = shape.prompt_len - shape.shared_prefix_len - shape.window_size
    expected = best_tokens([0.0] * scored, layer, shape.budget)
    assert kept.tolist() == [expected] * shape.num_kv_heads


def test_the_methods_are_those_of_the_settings() -> None:
    assert tuple(METHODS) == config_module.UNIFORM_METHODS


def test_only_methods_that_read_queries_ask_for_them(method_name: str, shape: Shape) -> None:
    method = METHODS[method_name](settings_for(shape, method_name))
    blind = random_layer(shape)._replace(queries=None)
    if method.needs_queries:
        with pytest.raises(AssertionError):
            method.score(blind)
    else:
        assert torch.equal(method.score(blind), method.score(random_layer(shape)))


def test_a_method_is_frozen(method_name: str) -> None:
    method = METHODS[method_name](KVCompressionConfig(method=method_name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.config = KVCompressionConfig()  # type: ignore[misc]
