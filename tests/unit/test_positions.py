# SPDX-License-Identifier: Apache-2.0
"""Positions of requests whose row is shorter than their text."""

import pytest
import torch

from lava_sglang.mem_cache.positions import PositionDeltas


@pytest.fixture
def deltas() -> PositionDeltas:
    return PositionDeltas(8, "cpu")


def shifted(deltas: PositionDeltas, positions: list[int], rows: list[int]) -> list[int]:
    found: list[int] = deltas.shift(torch.tensor(positions), torch.tensor(rows)).tolist()
    return found


def test_positions_are_shifted_by_row(deltas: PositionDeltas) -> None:
    deltas.set(3, 100)
    deltas.set(5, 7)
    assert shifted(deltas, [10, 20, 30, 40], [5, 1, 3, 5]) == [17, 20, 130, 47]


def test_rows_start_at_zero_and_the_padding_row_stays_there(deltas: PositionDeltas) -> None:
    for row in range(1, 8):
        deltas.set(row, 9)
    assert shifted(deltas, [4, 4], [0, 1]) == [4, 13]


def test_a_row_that_is_prefilled_again_is_reset(deltas: PositionDeltas) -> None:
    for row in (1, 2, 3):
        deltas.set(row, 50 + row)
    deltas.reset(torch.tensor([1, 3]))
    assert deltas.table.tolist() == [0, 0, 52, 0, 0, 0, 0, 0]


def test_a_delta_is_replaced_not_added(deltas: PositionDeltas) -> None:
    deltas.set(2, 10)
    deltas.set(2, 4)
    assert shifted(deltas, [1], [2]) == [5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_shift_is_a_new_tensor_of_the_same_dtype(
    deltas: PositionDeltas, dtype: torch.dtype
) -> None:
    deltas.set(1, 5)
    positions = torch.tensor([1, 2], dtype=dtype)
    found = deltas.shift(positions, torch.tensor([1, 1], dtype=dtype))
    assert found.dtype == dtype and found.tolist() == [6, 7]
    assert positions.tolist() == [1, 2]


def test_the_table_stays_where_a_captured_graph_reads_it(deltas: PositionDeltas) -> None:
    address = deltas.table.data_ptr()
    deltas.set(1, 5)
    deltas.reset(torch.tensor([1]))
    deltas.shift(torch.tensor([1]), torch.tensor([1]))
    assert deltas.table.data_ptr() == address and deltas.table.dtype == torch.int64
