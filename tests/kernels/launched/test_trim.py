# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels.trim import BLOCK_E, move_ref, move_triton
from tests.kernels.device import generator

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.mark.parametrize("itemsize", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("count", [1, BLOCK_E, 2 * BLOCK_E + 3])
def test_moves_whole_entries(itemsize: int, head_dim: int, count: int) -> None:
    g = generator(count)
    arena = torch.randint(0, 100, (3, 2, 40, 2, head_dim), generator=g).to(BITS[itemsize])
    k_rows = (torch.arange(3)[:, None] * 160 + torch.arange(80)).flatten()
    source, target = (k_rows[torch.randperm(240, generator=g)[:count]] for _ in range(2))
    got, want = arena.clone(), arena.clone()
    move_triton(got, source, target)
    move_ref(want, source, target)
    assert torch.equal(got, want) and not torch.equal(got, arena)


def test_a_move_reads_before_it_writes() -> None:
    arena = torch.randint(0, 100, (1, 2, 90, 1, 64)).short()
    before = arena.clone()
    move_triton(arena, torch.arange(89), torch.arange(1, 90))
    assert torch.equal(arena[0, :, 1:], before[0, :, :89])


def test_arena_past_32_bits() -> None:
    slots = 2**31 // (2 * 2 * 2 * 128) + 2**20
    arena = torch.empty(2, 2, slots, 2, 128, dtype=torch.int16)
    assert arena.numel() > 2**31
    first = (2 * slots + slots - 9) * 2  # a K row of the second layer, near its end
    rows = torch.arange(first, first + 8)
    arena.view(-1, 128)[rows] = 7
    arena.view(-1, 128)[rows + 2 * slots] = 9
    move_triton(arena, rows[:4], rows[4:] - 40)
    assert (arena.view(-1, 128)[rows[4:] - 40] == 7).all()
    assert (arena.view(-1, 128)[rows[4:] - 40 + 2 * slots] == 9).all()
