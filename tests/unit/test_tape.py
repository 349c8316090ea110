# SPDX-License-Identifier: Apache-2.0
"""The tables of compressed requests: what they say of a row, and what breaks the tape's rule."""

import pytest
import torch

from lava_sglang.mem_cache.host_tape import HostTape
from lava_sglang.mem_cache.tape import TapeTable

NUM_LAYERS = 2
KV_HEADS = 3
BUDGET = 4
TOTAL = NUM_LAYERS * KV_HEADS * BUDGET
OFFSETS = [0, 1, 9, 9, 14, 20, TOTAL]


@pytest.fixture
def tape() -> TapeTable:
    return TapeTable(8, NUM_LAYERS, KV_HEADS, "cpu")


def commit(tape: TapeTable, row: int, removed: int = 100, prefix_len: int = 5) -> None:
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    tape.commit(row, prefix_len, BUDGET, removed, offsets)


def shifted(tape: TapeTable, positions: list[int], rows: list[int]) -> list[int]:
    found: list[int] = tape.shift(torch.tensor(positions), torch.tensor(rows)).tolist()
    return found


def state(tape: TapeTable, row: int) -> tuple[int, int, int]:
    tables = (tape.prefix_lens, tape.budgets, tape.position_deltas)
    prefix_len, budget, removed = (int(table[row]) for table in tables)
    return prefix_len, budget, removed


def test_every_row_starts_uncompressed(tape: TapeTable) -> None:
    for row in range(8):
        assert state(tape, row) == (0, 0, 0)
        tape.check_integrity(row)


def test_a_commit_fills_its_row_and_no_other(tape: TapeTable) -> None:
    commit(tape, 3)
    assert state(tape, 3) == (5, BUDGET, 100)
    assert tape.offsets[3].tolist() == OFFSETS
    tape.check_integrity(3)
    for row in (0, 1, 2, 4, 5, 6, 7):
        assert state(tape, row) == (0, 0, 0) and tape.offsets[row].tolist() == [0] * 7


def test_a_commit_replaces_what_the_row_said(tape: TapeTable) -> None:
    commit(tape, 2, removed=10)
    tape.commit(2, 0, 1, 4, torch.arange(NUM_LAYERS * KV_HEADS + 1, dtype=torch.int32))
    assert state(tape, 2) == (0, 1, 4)
    assert tape.offsets[2].tolist() == list(range(7))
    assert shifted(tape, [1], [2]) == [5]


def test_the_table_keeps_no_view_of_the_offsets(tape: TapeTable) -> None:
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    tape.commit(1, 0, BUDGET, 9, offsets)
    offsets.zero_()
    assert tape.offsets[1].tolist() == OFFSETS


def test_rows_that_have_new_owners_are_reset(tape: TapeTable) -> None:
    for row in (1, 2, 3):
        commit(tape, row, removed=50 + row)
    tape.reset([1, 3])
    assert state(tape, 1) == state(tape, 3) == (0, 0, 0)
    assert state(tape, 2) == (5, BUDGET, 52)
    for row in range(8):
        tape.check_integrity(row)


def test_the_padding_row_stays_uncompressed(tape: TapeTable) -> None:
    for row in range(1, 8):
        commit(tape, row)
    tape.reset([0, 4])
    assert state(tape, 0) == (0, 0, 0) and tape.offsets[0].tolist() == [0] * 7
    assert shifted(tape, [4, 4], [0, 1]) == [4, 104]


def test_positions_are_shifted_by_row(tape: TapeTable) -> None:
    commit(tape, 3, removed=100)
    commit(tape, 5, removed=7)
    assert shifted(tape, [10, 20, 30, 40], [5, 1, 3, 5]) == [17, 20, 130, 47]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_shift_is_a_new_tensor_of_the_same_dtype(tape: TapeTable, dtype: torch.dtype) -> None:
    commit(tape, 1, removed=5)
    positions = torch.tensor([1, 2], dtype=dtype)
    found = tape.shift(positions, torch.tensor([1, 1], dtype=dtype))
    assert found.dtype == dtype and found.tolist() == [6, 7]
    assert positions.tolist() == [1, 2]


def test_the_tables_stay_where_a_captured_graph_reads_them(tape: TapeTable) -> None:
    tables = (tape.prefix_lens, tape.budgets, tape.offsets, tape.position_deltas)
    addresses = [table.data_ptr() for table in tables]
    commit(tape, 1)
    tape.reset([1])
    shifted(tape, [1], [1])
    after = (tape.prefix_lens, tape.budgets, tape.offsets, tape.position_deltas)
    assert [table.data_ptr() for table in after] == addresses
    assert [table.dtype for table in after] == [torch.int32] * 3 + [torch.int64]


def test_the_size_in_bytes_is_that_of_the_tables(tape: TapeTable) -> None:
    assert tape.nbytes == 8 * (4 + 4 + 7 * 4 + 8)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, 1, "starts at 1"),
        (2, 0, "fewer than 0 entries"),
        (5, TOTAL + 1, "fewer than 0 entries"),
        (6, TOTAL - 1, f"{TOTAL - 1} places, must be {TOTAL}"),
        (6, TOTAL + 1, f"{TOTAL + 1} places, must be {TOTAL}"),
    ],
)
def test_offsets_that_break_the_rule_are_found(
    tape: TapeTable, place: int, value: int, words: str
) -> None:
    commit(tape, 4)
    tape.check_integrity(4)
    tape.offsets[4, place] = value
    with pytest.raises(AssertionError, match=f"row 4: .*{words}"):
        tape.check_integrity(4)


def test_a_budget_that_is_not_the_tapes_is_found(tape: TapeTable) -> None:
    commit(tape, 4)
    tape.budgets[4] = BUDGET + 1
    with pytest.raises(AssertionError, match=f"row 4: {TOTAL} places, must be {TOTAL + 6}"):
        tape.check_integrity(4)


def test_a_shift_without_compression_is_found(tape: TapeTable) -> None:
    commit(tape, 4)
    tape.budgets[4] = 0
    with pytest.raises(AssertionError, match="row 4: shifted but uncompressed"):
        tape.check_integrity(4)


def test_the_host_has_what_the_tables_say(tape: TapeTable) -> None:
    tape.host = HostTape()
    commit(tape, 3)
    found = tape.host.pieces([0, 3])
    assert found[0] is None and found[1] is not None
    assert found[1].budget == BUDGET and found[1].offsets.tolist() == OFFSETS
    assert found[1].offsets.device.type == "cpu"
    tape.check_integrity(3)


def test_pieces_are_the_same_objects_until_a_row_changes(tape: TapeTable) -> None:
    host = tape.host = HostTape()
    commit(tape, 3)
    commit(tape, 5)
    before = host.pieces([5, 3, 1])
    assert all(a is b for a, b in zip(before, host.pieces([5, 3, 1]), strict=True))
    commit(tape, 3)
    tape.reset([5, 1])
    after = host.pieces([5, 3, 1])
    assert after[0] is None and after[1] is not before[1]


def test_the_host_keeps_no_view_of_the_table(tape: TapeTable) -> None:
    tape.host = HostTape()
    commit(tape, 3)
    (pieces,) = tape.host.pieces([3])
    tape.offsets[3] = 0
    assert pieces is not None and pieces.offsets.tolist() == OFFSETS


@pytest.mark.parametrize("stale", ["budget", "offsets", "reset"])
def test_a_host_that_is_behind_breaks_the_tapes_rule(tape: TapeTable, stale: str) -> None:
    tape.host = HostTape()
    commit(tape, 3)
    if stale == "budget":
        tape.host.commit(3, BUDGET + 1, tape.offsets[3])
    elif stale == "offsets":
        tape.host.commit(3, BUDGET, tape.offsets[3].flip(0))
    else:
        tape.budgets[3] = tape.position_deltas[3] = 0
    with pytest.raises(AssertionError, match="row 3: the host"):
        tape.check_integrity(3)
