# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels import flashinfer_decode
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.flashinfer_decode import (
    TapeLayout,
    exact_slots_triton,
    tape_pages_triton,
)
from lava_sglang.kernels.reference import exact_slots_ref, tape_pages_ref
from tests.kernels.tape_batch import Request, TapeBatch, tape_batch

MIXED = [
    Request(prefix=37, budget=11, tail=5),
    Request(prefix=0, budget=0, tail=70),
    Request(prefix=0, budget=33, tail=1, cut="last"),
    Request(prefix=3, budget=32, tail=33, cut="even"),
    Request(prefix=2, budget=1, tail=1, cut="first"),
]


def check(batch: TapeBatch) -> None:
    """Page for page, and nothing written beside them."""
    layers, _, _, kv_heads, _ = batch.arena.shape
    rows = batch.req_pool_indices
    budgets = batch.budgets[rows]
    layout = TapeLayout(batch.offsets[rows] * (budgets > 0)[:, None].int(), layers, kv_heads)
    tables = batch.tables()
    got = torch.full((sum(layout.layer_lens) + 9,), -1, dtype=torch.int32)
    want = got.clone()
    args = (layout.starts, batch.arena, tables, layout.longest)
    tape_pages_triton(got, *args)
    tape_pages_ref(want, *args)
    assert torch.equal(got, want)
    assert (got[:-9] >= 0).all() and len(got[:-9].unique()) == len(got) - 9

    lens = batch.seq_lens - budgets
    indptr = torch.tensor([0, *lens]).cumsum(0).int()
    got = torch.full((int(lens.sum()) + 9,), -1, dtype=torch.int32)
    want = got.clone()
    exact_slots_triton(got, indptr, tables, int(lens.max()))
    exact_slots_ref(want, indptr, tables, int(lens.max()))
    assert torch.equal(got, want) and (got[:-9] >= 0).all()


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("padding_rows", [0, 2])
def test_mixed_batch(kv_heads: int, padding_rows: int) -> None:
    check(tape_batch(MIXED, kv_heads=kv_heads, layers=3, padding_rows=padding_rows))


@pytest.mark.parametrize("cut", ["even", "first", "last", [0, 1, 39, 0], [32, 0, 8, 0]])
def test_cut(cut: str | list[int]) -> None:
    check(tape_batch([Request(0, 10, 1, cut), Request(2, 10, 1, cut)]))


@pytest.mark.parametrize("block", [16, 64])
def test_lists_of_many_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_decode, "BLOCK", block)
    check(tape_batch([Request(100, 40, 60), Request(0, 64, 1, "last"), Request(0, 0, 1)]))


def test_a_page_past_31_bits_of_bytes() -> None:
    """Slots so high that their rows end the largest arena; the arena itself is not allocated."""
    layers, slots, kv_heads = 32, 2**23 - 1, 4
    columns = layers * kv_heads
    offsets = torch.full((1, columns + 1), columns - 1, dtype=torch.int32)
    offsets[0, -1] = columns
    pages = torch.zeros(1, dtype=torch.int32)
    tape_pages_triton(
        pages,
        torch.zeros(layers, 1, dtype=torch.int64),
        torch.empty(layers, 2, slots, kv_heads, 128, device="meta"),
        BatchTables(
            req_to_token=torch.tensor([[slots - 1]], dtype=torch.int32),
            req_pool_indices=torch.tensor([0]),
            seq_lens=torch.tensor([1]),
            prefix_lens=torch.tensor([0], dtype=torch.int32),
            budgets=torch.tensor([1], dtype=torch.int32),
            offsets=offsets,
        ),
        1,
    )
    assert int(pages[0]) == (2 * (layers - 1) * slots + slots - 1) * kv_heads + kv_heads - 1
