# SPDX-License-Identifier: Apache-2.0
"""Page lists and plans for FlashInfer, over a torch model of its wrappers, against the reference.

Nothing here runs FlashInfer's kernels, which need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.kernels import flashinfer_decode
from lava_sglang.kernels.flashinfer_decode import FlashInferDecode, PlanFence, shape_reasons
from lava_sglang.kernels.reference import ragged_decode_ref
from tests.kernels.flashinfer_model import FLASHINFER
from tests.kernels.tape_batch import Request, TapeBatch, tape_batch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIXED = [
    Request(prefix=37, budget=11, tail=5),
    Request(prefix=0, budget=0, tail=70),
    Request(prefix=0, budget=33, tail=1, cut="last"),
    Request(prefix=3, budget=32, tail=33, cut="even"),
    Request(prefix=7, budget=5, tail=0, cut="first"),
]


@pytest.fixture(scope="module", autouse=True)
def small_workspace() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer_decode, "FLOAT_WORKSPACE", 2**16)
        yield


def decode_over(batch: TapeBatch) -> FlashInferDecode:
    return FlashInferDecode(FLASHINFER, batch.arena, batch.q.shape[1], len(batch.q), batch.scaling)


def plan(decode: FlashInferDecode, batch: TapeBatch) -> None:
    rows = batch.req_pool_indices
    budgets = batch.budgets[rows]
    on_host = batch.offsets[rows] * (budgets > 0)[:, None].int()
    decode.plan_tape(batch.tables(), on_host)
    decode.plan_exact(batch.tables(), batch.seq_lens - budgets)


def check(batch: TapeBatch, decode: FlashInferDecode | None = None) -> None:
    decode = decode or decode_over(batch)
    plan(decode, batch)
    for layer in range(len(batch.arena)):
        want = ragged_decode_ref(batch.q, batch.arena, layer, batch.tables(), batch.scaling)
        got = decode.run(batch.q, layer)
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[batch.q.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_batch(dtype: torch.dtype) -> None:
    check(tape_batch(MIXED, dtype=dtype, padding_rows=1))


@pytest.mark.parametrize("group", range(1, 9))
def test_group(group: int) -> None:
    """Up to 3 query heads on CUDA cores, from 4 on tensor cores, whose kernel takes any number."""
    batch = tape_batch(MIXED, group=group, seed=group)
    decode = decode_over(batch)
    assert {w.use_tensor_cores for w in (decode.exact, *decode.tape)} == {group >= 4}
    check(batch, decode)


@pytest.mark.parametrize("head_dim", flashinfer_decode.HEAD_DIMS)
def test_head_dim(head_dim: int) -> None:
    check(tape_batch(MIXED, head_dim=head_dim, kv_heads=3, group=1))


@pytest.mark.parametrize(
    "cut", ["even", "first", "last", [0, 1, 39, 0], [1, 0, 0, 39], [32, 0, 8, 0], [0, 0, 40, 0]]
)
def test_cut(cut: str | list[int]) -> None:
    """Empty pieces, one entry, one head with everything, a layer without any."""
    check(tape_batch([Request(0, 10, 1, cut), Request(2, 10, 0, cut)], dtype=torch.float32))


REQUESTS = st.lists(
    st.builds(
        Request,
        prefix=st.integers(0, 9),
        budget=st.integers(0, 9),
        tail=st.integers(1, 5),
        cut=st.sampled_from(["random", "even", "first", "last"]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=REQUESTS,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    padding_rows=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_batch(
    requests: list[Request], layers: int, kv_heads: int, group: int, padding_rows: int, seed: int
) -> None:
    check(
        tape_batch(
            requests, layers=layers, kv_heads=kv_heads, group=group, head_dim=16,
            dtype=torch.float32, padding_rows=padding_rows, seed=seed,
        )
    )  # fmt: skip


def test_a_batch_without_a_tape_makes_one_plan_and_one_call() -> None:
    batch = tape_batch([Request(0, 0, 7), Request(0, 0, 3)], padding_rows=1)
    decode = decode_over(batch)
    check(batch, decode)
    assert [w.plans for w in (decode.exact, *decode.tape)] == [1, 0, 0]


def test_one_batch_after_another() -> None:
    """A shorter batch, one without a tape, and the first again leave nothing behind."""
    batches = [tape_batch(MIXED), tape_batch(MIXED[1:2]), tape_batch(MIXED[2:]), tape_batch(MIXED)]
    decode = decode_over(batches[0])
    for batch in batches:
        grown = torch.zeros_like(batches[0].arena)
        grown[:, :, : batch.arena.shape[2]] = batch.arena
        decode.arena.copy_(grown)
        batch.arena = decode.arena
        check(batch, decode)


def test_a_longer_tail_needs_no_new_plan_of_the_tape() -> None:
    batch = tape_batch(MIXED[:1], padding_rows=1)
    decode = decode_over(batch)
    check(batch, decode)
    batch.seq_lens[0] -= 1
    rows = batch.req_pool_indices
    decode.plan_exact(batch.tables(), batch.seq_lens - batch.budgets[rows])
    assert [w.plans for w in (decode.exact, *decode.tape)] == [2, 1, 1]
    for layer in (0, 1):
        want = ragged_decode_ref(batch.q, batch.arena, layer, batch.tables(), batch.scaling)
        torch.testing.assert_close(decode.run(batch.q, layer), want, rtol=0, atol=2e-3)


def test_warm_up_runs_every_call_and_writes_nothing() -> None:
    batch = tape_batch(MIXED)
    decode = decode_over(batch)
    before = batch.arena.clone()
    decode.warm_up()
    assert [w.plans for w in (decode.exact, *decode.tape)] == [1, 1, 1]
    assert torch.equal(batch.arena, before)
    check(batch, decode)


def test_queries_may_be_a_part_of_a_larger_tensor() -> None:
    batch = tape_batch(MIXED)
    batch.q = torch.randn(len(MIXED), 3, *batch.q.shape[1:]).half()[:, 1]
    check(batch)


def test_a_request_without_its_new_token_is_refused() -> None:
    batch = tape_batch([Request(0, 4, 0)])
    with pytest.raises(AssertionError, match="new token"):
        plan(decode_over(batch), batch)


def arena_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("arena", "num_qo_heads", "words"),
    [
        (arena_of(2, 2, 9, 2, 64, dtype=torch.float32), 4, "KV entries of torch.float32"),
        (arena_of(2, 2, 9, 2, 80), 4, "head_dim=80: FlashInfer decode accepts 64, 128, 256"),
        (arena_of(2, 2, 9, 1, 64), 17, "17 query heads per KV head"),
        (arena_of(32, 2, 2**23, 4, 128), 16, "2147483648 K and V rows in 8388608 slots"),
    ],
)
def test_what_flashinfer_does_not_take_is_told(
    arena: torch.Tensor, num_qo_heads: int, words: str
) -> None:
    (reason,) = shape_reasons(arena, num_qo_heads)
    assert words in reason and "accepts" in reason


def test_the_largest_arena_is_served() -> None:
    assert shape_reasons(arena_of(32, 2, 2**23 - 1, 4, 128), 16) == []


def test_the_host_waits_for_the_copy_of_the_plan_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the plan is copied behind what was launched before."""
    calls: list[str] = []

    class Event:
        def synchronize(self) -> None:
            calls.append("wait")

        def record(self) -> None:
            calls.append("record")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    fence = PlanFence(torch.device("cuda"))
    for _ in range(2):
        with fence:
            calls.append("plan")
    assert calls == ["wait", "plan", "record"] * 2
