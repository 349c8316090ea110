# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels.select import select, select_triton
from tests.kernels.selections import check_selection, random_problem


@pytest.mark.parametrize("head_floor", [0, 4, 1000])
@pytest.mark.parametrize("levels", [None, 1, 3, 20])
def test_equals_the_reference(levels: int | None, head_floor: int) -> None:
    for seed in range(2):
        check_selection(select_triton, *random_problem(seed, levels=levels), head_floor=head_floor)


@pytest.mark.parametrize(
    ("layers", "heads", "tokens"), [(1, 1, 1), (1, 1, 2500), (2, 1, 7), (3, 5, 33), (1, 12, 1025)]
)
def test_shape(layers: int, heads: int, tokens: int) -> None:
    problem = random_problem(tokens, layers=layers, heads=heads, tokens=tokens)
    check_selection(select_triton, *problem)
    check_selection(select_triton, *problem, head_floor=tokens // 3)


def test_ties_over_several_blocks() -> None:
    problem = random_problem(7, layers=2, tokens=2500, levels=2)
    check_selection(select_triton, *problem)


def test_a_floor_for_each_layer() -> None:
    scores, counts, budget = random_problem(3, layers=4, levels=9)
    floors = torch.tensor([0, 2, 5, 99])
    got = check_selection(select_triton, scores, counts, budget, head_floor=floors)
    kept = got.counts - 3
    assert (kept >= torch.minimum(floors, counts // 2)[:, None]).all()


def test_all_or_nothing_in_a_layer() -> None:
    scores = torch.rand(3, 2, 40)
    counts = torch.tensor([0, 80, 40])
    got = check_selection(select_triton, scores, counts, budget=23)
    assert got.counts[0].tolist() == [3, 3] and got.counts[1].tolist() == [43, 43]


def test_one_head_takes_all() -> None:
    scores = torch.rand(1, 3, 40)
    scores[0, 1] += 1
    got = check_selection(select_triton, scores, torch.tensor([30]), budget=13)
    assert got.counts.tolist() == [[3, 33, 3]]


def test_ties_go_to_the_lower_head_and_token() -> None:
    got = check_selection(select_triton, torch.ones(1, 2, 8), torch.tensor([10]), budget=8)
    assert got.tape_tokens.tolist() == [*range(5, 16), 5, 6, 13, 14, 15]


def test_zeros_negatives_and_infinity_are_ordered() -> None:
    scores = torch.tensor([[[-0.0, 0.0, -1.0, 1e-45], [-0.0, float("inf"), 0.0, 3e38]]])
    for count in range(0, 9, 2):
        check_selection(select_triton, scores, torch.tensor([count]), budget=3 + count // 2)


def test_scores_that_are_not_numbers_keep_the_sum_exact() -> None:
    scores = torch.rand(2, 2, 50)
    scores[0, 0, ::3] = float("nan")
    scores[1] = float("nan")
    counts = torch.tensor([30, 50])
    got = select_triton(scores, counts, 23, 5, 3)
    assert got.counts.sum() == 4 * 23 and got.offsets[-1] == 4 * 23
    assert torch.equal(got.tape_tokens, select(scores, counts, 23, 5, 3).tape_tokens)


@pytest.mark.parametrize("window_size", [1, 32, 100])
def test_window_size(window_size: int) -> None:
    problem = random_problem(1, window_size=window_size)
    check_selection(select_triton, *problem, window_size=window_size)
