# SPDX-License-Identifier: Apache-2.0
"""A tape is rewritten in place: against a copy, for every staging size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.kernels.trim import move_ref, trim


def read(
    arena: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, width: int
) -> torch.Tensor:
    """Entries at tape places, [n, 2, head_dim], by the tape's rule."""
    heads = arena.shape[3]
    column = places // width
    return arena[column // heads, :, slots[places % width], column % heads]


@settings(deadline=None, max_examples=200)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    budget=st.integers(1, 17),
    share=st.floats(0, 1),
    staged=st.integers(1, 300),
    front=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_the_kept_entries_are_in_the_first_slots(
    layers: int, heads: int, budget: int, share: float, staged: int, front: bool, seed: int
) -> None:
    """front: what stays is all at one end, where the two passes overlap the most."""
    g = torch.Generator().manual_seed(seed)
    head_dim = 16
    arena = torch.randn(layers, 2, budget + 5, heads, head_dim, generator=g)
    slots = torch.randperm(budget + 5, generator=g)[:budget]
    new_budget = max(1, int(share * budget))
    columns = layers * heads
    keep = torch.randperm(columns * budget, generator=g)
    if front:
        keep = torch.arange(columns * budget).flip(0) if seed % 2 else torch.arange(len(keep))
    places = keep[: columns * new_budget].sort().values
    expected = read(arena, slots, places, budget)
    others = torch.ones(budget + 5, dtype=torch.bool)
    others[slots] = False
    before = arena[:, :, others].clone()
    trim(arena, slots, places, new_budget, staging_bytes=staged * 2 * head_dim * 4)
    order = torch.arange(columns * new_budget)
    assert torch.equal(read(arena, slots, order, new_budget), expected)
    assert torch.equal(arena[:, :, others], before), "another request's slots were written"


def test_a_move_reads_before_it_writes() -> None:
    arena = torch.arange(2 * 4 * 16.0).view(1, 2, 4, 1, 16).clone()
    before = arena.clone()
    move_ref(arena, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    assert torch.equal(arena[0, :, 1:], before[0, :, :3])


@pytest.mark.parametrize("places", [torch.arange(3), torch.arange(4).int()])
def test_refuses_another_number_or_type_of_places(places: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        trim(torch.zeros(1, 2, 4, 2, 16), torch.arange(3), places, 2)
