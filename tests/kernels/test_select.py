# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.kernels.select import select
from tests.kernels.selections import check_selection, random_problem


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    heads=st.integers(1, 5),
    tokens=st.integers(1, 40),
    levels=st.sampled_from([None, 1, 2, 9]),
    head_floor=st.integers(0, 50),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_reference(
    seed: int, layers: int, heads: int, tokens: int, levels: int | None, head_floor: int
) -> None:
    problem = random_problem(seed, layers=layers, heads=heads, tokens=tokens, levels=levels)
    got = check_selection(select, *problem, head_floor=head_floor)
    lowest = torch.minimum(torch.tensor(head_floor), problem[1] // heads)
    assert (got.counts - 3 >= lowest[:, None]).all()


def test_uniform_heads_by_a_full_floor() -> None:
    """A floor of the mean keeps the same number in every head."""
    scores, _, _ = random_problem(0, layers=2, heads=4, tokens=50)
    counts = torch.tensor([40, 40])
    got = check_selection(select, scores, counts, budget=13, head_floor=10)
    assert (got.counts == 13).all()


def test_a_larger_count_keeps_a_superset() -> None:
    scores, _, _ = random_problem(1, layers=1, heads=3, tokens=30, levels=4)
    before: set[tuple[int, int]] = set()
    for budget in range(3, 34):
        got = select(scores, torch.tensor([3 * (budget - 3)]), budget, 5, 3)
        heads = torch.arange(3).repeat_interleave(got.counts[0])
        now = set(zip(heads.tolist(), got.tape_tokens.tolist(), strict=True))
        assert before < now
        before = now


def test_zeros_negatives_and_infinity_are_ordered() -> None:
    scores = torch.tensor([[[-0.0, 0.0, -1.0, 1e-45], [-0.0, float("inf"), 0.0, 3e38]]])
    for count in range(0, 9, 2):
        check_selection(select, scores, torch.tensor([count]), budget=3 + count // 2)


def test_scores_that_are_not_numbers_keep_the_sum_exact() -> None:
    scores = torch.full((1, 2, 20), float("nan"))
    got = select(scores, torch.tensor([14]), 10, 0, 3, head_floor=2)
    assert got.offsets[-1] == 20 == len(got.tape_tokens)


@pytest.mark.parametrize(
    ("scores", "counts"),
    [
        (torch.zeros(2, 2, 5, dtype=torch.float16), torch.tensor([5, 5])),
        (torch.zeros(2, 5, 2).mT, torch.tensor([5, 5])),
        (torch.zeros(2, 2, 5), torch.tensor([5])),
        (torch.zeros(2, 2, 5), torch.tensor([5.0, 5.0])),
    ],
)
def test_refuses_bad_tensors(scores: torch.Tensor, counts: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        select(scores, counts, 6, 0, 3)
