# SPDX-License-Identifier: Apache-2.0
"""The plain-torch ops against loops over single numbers."""

import math

import pytest
import torch

from lava_sglang.kernels.reference import max_pool_ref, span_pool_ref, window_attention_ref


def window_attention_by_loops(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    power: int,
    query_weights: list[float],
) -> torch.Tensor:
    """float64 [num_qo_heads, prompt_len]; one query, one head, one key at a time."""
    num_queries, num_qo_heads, head_dim = queries.shape
    prompt_len, num_kv_heads, _ = keys.shape
    group = num_qo_heads // num_kv_heads
    mean = torch.zeros(num_qo_heads, prompt_len, dtype=torch.float64)
    for head in range(num_qo_heads):
        for place in range(num_queries):
            position = prompt_len - num_queries + place
            logits = [
                scaling
                * sum(
                    float(queries[place, head, d]) * float(keys[token, head // group, d])
                    for d in range(head_dim)
                )
                for token in range(position + 1)
            ]
            total = sum(math.exp(logit) for logit in logits)
            for token, logit in enumerate(logits):
                mean[head, token] += query_weights[place] * (math.exp(logit) / total) ** power
    return mean ** (1 / power)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("root_mean_square", [False, True])
@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize(("num_queries", "prompt_len"), [(1, 1), (4, 4), (4, 13), (1, 9)])
def test_window_attention_equals_loops(
    group: int, num_queries: int, prompt_len: int, root_mean_square: bool, weighted: bool
) -> None:
    torch.manual_seed(group)
    queries = torch.randn(num_queries, 2 * group, 8)
    keys = torch.randn(prompt_len, 2, 8)
    weights = torch.rand(num_queries).softmax(0) if weighted else None
    attention = window_attention_ref(
        queries, keys, 0.7, query_weights=weights, root_mean_square=root_mean_square
    )
    assert attention.dtype == torch.float32
    each = weights.tolist() if weights is not None else [1 / num_queries] * num_queries
    power = 2 if root_mean_square else 1
    expected = window_attention_by_loops(queries, keys, 0.7, power, each)
    torch.testing.assert_close(attention.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_window_query_sees_no_later_token() -> None:
    """Without the mask the last key would take everything."""
    queries = torch.ones(3, 1, 4)
    keys = torch.zeros(6, 1, 4)
    keys[5] = 100.0
    attention = window_attention_ref(queries, keys, 1.0)[0]
    # Queries at 3, 4 and 5 see 4, 5 and 6 tokens; only the last one sees the loud key.
    expected = torch.tensor([1 / 4 + 1 / 5] * 4 + [1 / 5, 1.0]) / 3
    torch.testing.assert_close(attention, expected)


def test_window_attention_sums_to_one_and_keeps_its_inputs() -> None:
    queries = torch.randn(5, 6, 16, dtype=torch.bfloat16)
    keys = torch.randn(40, 2, 16, dtype=torch.bfloat16)
    before = queries.clone(), keys.clone()
    attention = window_attention_ref(queries, keys, 0.25)
    torch.testing.assert_close(attention.sum(-1), torch.ones(6))
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


def test_query_heads_of_a_group_read_one_key_head() -> None:
    queries = torch.randn(2, 6, 8)
    keys = torch.randn(10, 2, 8)
    grouped = window_attention_ref(queries, keys, 0.3)
    plain = window_attention_ref(queries, keys.repeat_interleave(3, dim=1), 0.3)
    torch.testing.assert_close(grouped, plain)


@pytest.mark.parametrize("width", [1, 3, 7, 63])
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_max_pool_equals_loops(width: int, tokens: int) -> None:
    scores = torch.randn(3, tokens) - 5  # below zero: padding must not win
    pooled = max_pool_ref(scores, width)
    half = width // 2
    for row in range(3):
        for token in range(tokens):
            near = scores[row, max(0, token - half) : token + half + 1]
            assert pooled[row, token] == near.max()


@pytest.mark.parametrize("span", [0, 1, 12, 63])
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_span_pool_equals_loops(span: int, tokens: int) -> None:
    scores = torch.rand(3, tokens)
    pooled = span_pool_ref(scores, span)
    for row in range(3):
        for token in range(tokens):
            assert pooled[row, token] == scores[row, max(0, token - span) : token + 1].max()
