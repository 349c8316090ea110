# SPDX-License-Identifier: Apache-2.0
"""The plain-torch ops against loops over single numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.kernels.reference import (
    copy_entries_ref,
    max_pool_ref,
    top_entries_ref,
    window_attention_ref,
)


def window_attention_by_loops(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float
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
                mean[head, token] += math.exp(logit) / total / num_queries
    return mean


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize(("num_queries", "prompt_len"), [(1, 1), (4, 4), (4, 13), (1, 9)])
def test_window_attention_equals_loops(group: int, num_queries: int, prompt_len: int) -> None:
    torch.manual_seed(group)
    queries = torch.randn(num_queries, 2 * group, 8)
    keys = torch.randn(prompt_len, 2, 8)
    attention = window_attention_ref(queries, keys, 0.7)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(
        attention.double(), window_attention_by_loops(queries, keys, 0.7), rtol=1e-5, atol=1e-6
    )


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


@settings(deadline=None, max_examples=200)
@given(data=st.data(), tokens=st.integers(1, 40), levels=st.sampled_from([1, 2, 5, 1000]))
def test_top_entries_are_the_best_and_ties_go_to_the_lower_token(
    data: st.DataObject, tokens: int, levels: int
) -> None:
    values = data.draw(st.lists(st.integers(0, levels), min_size=tokens, max_size=tokens))
    count = data.draw(st.integers(0, tokens))
    scores = torch.tensor([values, values[::-1]], dtype=torch.float32)
    kept = top_entries_ref(scores, count)
    assert kept.dtype == torch.int64 and kept.shape == (2, count)
    for row, row_values in enumerate((values, values[::-1])):
        best = sorted(range(tokens), key=lambda token: (-row_values[token], token))
        assert kept[row].tolist() == sorted(best[:count])


def test_top_entries_of_every_leading_dimension() -> None:
    scores = torch.rand(2, 3, 50)
    kept = top_entries_ref(scores, 7)
    assert kept.shape == (2, 3, 7)
    assert torch.equal(kept[1, 2], top_entries_ref(scores[1, 2], 7))


def test_infinite_scores_win() -> None:
    scores = torch.tensor([[0.0, torch.inf, 5.0, torch.inf]])
    assert top_entries_ref(scores, 2).tolist() == [[1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copy_moves_the_right_rows_and_nothing_else(dtype: torch.dtype) -> None:
    num_layers, slots, num_kv_heads, head_dim = 3, 30, 2, 4
    buffers = []
    for layer in range(num_layers):
        buffer = torch.full((slots, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        for slot in range(20):  # what the prompt wrote; the rest was never written
            for head in range(num_kv_heads):
                buffer[slot, head] = 100 * layer + 2 * slot + head
        buffers.append(buffer)
    before = [buffer.clone() for buffer in buffers]
    kept = 5
    src = torch.stack(
        [
            torch.stack([torch.randperm(20)[:kept].sort().values for _ in range(num_kv_heads)])
            for _ in range(num_layers)
        ]
    )
    dst = torch.tensor([28, 21, 25, 22, 29])

    copy_entries_ref(buffers, src, dst)

    untouched = [slot for slot in range(slots) if slot not in dst.tolist()]
    for layer in range(num_layers):
        for head in range(num_kv_heads):
            for column in range(kept):
                expected = before[layer][src[layer, head, column], head]
                assert torch.equal(buffers[layer][dst[column], head], expected)
        assert torch.equal(
            buffers[layer][untouched].nan_to_num(-1), before[layer][untouched].nan_to_num(-1)
        )


def test_copy_refuses_another_number_of_layers() -> None:
    with pytest.raises(ValueError, match="zip"):
        copy_entries_ref([torch.zeros(4, 1, 2)], torch.zeros(2, 1, 1).long(), torch.tensor([3]))
