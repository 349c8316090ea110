# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.kernels.layer_split import (
    layer_entropy,
    layer_split,
    pyramid_weights,
    uniform_weights,
)
from lava_sglang.kernels.reference import layer_split_ref

WEIGHTS = st.lists(
    st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, int]:
    weights = draw(WEIGHTS)
    cap = draw(st.integers(1, 40))
    return weights, draw(st.integers(0, cap * len(weights))), cap


@given(problems())
@settings(max_examples=400, deadline=None)
def test_equals_the_reference(problem: tuple[list[float], int, int]) -> None:
    weights, total, cap = problem
    got = layer_split(torch.tensor(weights), total, cap).tolist()
    assert got == layer_split_ref(weights, total, cap)
    assert sum(got) == total


@given(WEIGHTS, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_smaller_total_gives_no_layer_more(weights: list[float], cap: int) -> None:
    before = [0] * len(weights)
    for total in range(len(weights) * cap + 1):
        now = layer_split(torch.tensor(weights), total, cap).tolist()
        assert all(a <= b for a, b in zip(before, now, strict=True))
        before = now


def test_proportional_and_tied_to_the_lower_layer() -> None:
    assert layer_split(torch.tensor([0.5, 1.0, 0.5]), 8, 100).tolist() == [2, 4, 2]
    assert layer_split(uniform_weights(4), 6, 100).tolist() == [2, 2, 1, 1]


def test_excess_moves_to_layers_with_room() -> None:
    assert layer_split(torch.tensor([1.0, 0.1, 0.1]), 14, 10).tolist() == [10, 2, 2]
    assert layer_split(torch.tensor([1.0, 0.0]), 13, 10).tolist() == [10, 3]


def test_all_weights_zero_is_uniform() -> None:
    assert layer_split(torch.zeros(3), 7, 9).tolist() == [3, 2, 2]


@pytest.mark.parametrize(("total", "cap"), [(31, 10), (-1, 10), (0, 0), (0, 2**30 + 1)])
def test_refuses_what_cannot_be_split(total: int, cap: int) -> None:
    with pytest.raises(AssertionError):
        layer_split(uniform_weights(3), total, cap)


def test_pyramid_falls_to_a_twentieth_of_the_mean() -> None:
    weights = pyramid_weights(32).double()
    torch.testing.assert_close(weights[-1], weights.mean() / 20, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights.diff(), weights.diff()[0].expand(31), rtol=1e-4, atol=0)
    assert pyramid_weights(1).tolist() == [1.0]


def test_entropy_by_hand() -> None:
    scores = torch.zeros(4, 2, 3)
    scores[0] = 2.5  # all equal
    scores[1, 1, 2] = 7.0  # one entry
    scores[2, 0, :2] = 3.0  # half and half
    expected = [1.0, 0.0, math.log(2) / math.log(6), 0.0]
    torch.testing.assert_close(layer_entropy(scores), torch.tensor(expected))
    assert layer_entropy(torch.ones(2, 1, 1)).tolist() == [0.0, 0.0]
