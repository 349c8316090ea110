# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels import arena as arena_module
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode_triton
from lava_sglang.kernels.reference import ragged_decode_ref
from tests.kernels.device import DTYPES, FP8
from tests.kernels.tape_batch import Request, TapeBatch, tape_batch

MIXED = [
    Request(prefix=37, budget=11, tail=5),
    Request(prefix=0, budget=0, tail=70),
    Request(prefix=0, budget=33, tail=0, cut="last"),
    Request(prefix=3, budget=32, tail=33, cut="even"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.6e-2}


def workspace_for(batch: TapeBatch, num_programs: int = 6) -> DecodeWorkspace:
    bs, num_qo_heads, head_dim = batch.q.shape
    workspace = DecodeWorkspace(
        bs, num_qo_heads, batch.arena.shape[3], head_dim, torch.get_default_device(),
        num_programs=num_programs, max_splits=4, min_chunk=32,
    )  # fmt: skip
    workspace.partial.fill_(float("nan"))
    workspace.lse.fill_(float("nan"))
    return workspace


def check(
    batch: TapeBatch, layer: int = 1, num_programs: int = 6, slack: float = 1, **options: object
) -> None:
    args = (batch.q, batch.arena, layer, batch.tables(), batch.scaling)
    got = ragged_decode_triton(*args, workspace=workspace_for(batch, num_programs), **options)
    want = ragged_decode_ref(*args, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=slack * TOLERANCE[batch.q.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [0, 1])
def test_mixed_batch(dtype: torch.dtype, layer: int) -> None:
    check(tape_batch(MIXED, dtype=dtype, padding_rows=1), layer)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16])
def test_group(group: int) -> None:
    check(tape_batch(MIXED[:2], group=group, seed=group))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dim(head_dim: int) -> None:
    check(tape_batch(MIXED[:1], head_dim=head_dim, group=3, kv_heads=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", [1, 5, 16, 40, 60, 100])
def test_sliding_window(sliding_window: int, dtype: torch.dtype) -> None:
    """It ends in the tail, in a piece and in a prefix; a chunk may be longer than it."""
    batch = tape_batch([*MIXED, Request(40, 40, 30)], dtype=dtype, padding_rows=1)
    for layer in (0, 1):
        # Few entries leave large numbers, whose last place is worth more.
        check(batch, layer, slack=2, sliding_window=sliding_window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit_cap", [0.5, 5.0, 50.0])
def test_logit_cap(logit_cap: float, dtype: torch.dtype) -> None:
    batch = tape_batch(MIXED, dtype=dtype)
    batch.q *= 4
    check(batch, slack=4, logit_cap=logit_cap)
    check(batch, slack=4, logit_cap=logit_cap, sliding_window=33, k_scale=2.0, v_scale=0.5)


@pytest.mark.parametrize(
    "cut",
    ["even", "first", "last", [0, 1, 39, 0], [1, 0, 0, 39], [10, 10, 10, 10], [32, 0, 8, 0]],
)
def test_cut(cut: str | list[int]) -> None:
    """Empty pieces, one entry, one head with everything, in every layer."""
    batch = tape_batch([Request(0, 10, 1, cut), Request(2, 10, 0, cut)], dtype=torch.float32)
    for layer in (0, 1):
        check(batch, layer)


def test_head_without_entries_gives_zeros() -> None:
    batch = tape_batch([Request(0, 10, 0, "first")])
    args = (batch.q, batch.arena, 1, batch.tables(), batch.scaling)
    out = ragged_decode_triton(*args, workspace=workspace_for(batch))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("num_programs", [1, 2, 50])
def test_any_number_of_chunks(num_programs: int) -> None:
    batch = tape_batch([Request(100, 40, 60), Request(0, 64, 1)], dtype=torch.float32)
    check(batch, num_programs=num_programs)


def test_large_batch_of_short_requests() -> None:
    check(tape_batch([Request(1, 1, 1)] * 3 + [Request(0, 0, 1)] * 130, kv_heads=1, group=1))


def test_long_head_gets_more_chunks() -> None:
    batch = tape_batch([Request(0, 100, 0, [397, 1, 1, 1])], group=1)
    workspace = workspace_for(batch)
    ragged_decode_triton(
        batch.q, batch.arena, 0, batch.tables(), batch.scaling, workspace=workspace
    )
    chunks = workspace.lse.view(2, -1).isfinite().sum(dim=1)
    assert chunks.tolist() == [4, 1]


def test_output_and_strided_queries() -> None:
    batch = tape_batch(MIXED)
    qkv = torch.randn(len(MIXED), 3, *batch.q.shape[1:]).half()
    batch.q = qkv[:, 1]
    out = torch.empty(batch.q.shape, dtype=torch.float16)
    args = (batch.q, batch.arena, 1, batch.tables(), batch.scaling)
    assert ragged_decode_triton(*args, out, workspace=workspace_for(batch)) is out
    torch.testing.assert_close(out, ragged_decode_ref(*args), rtol=0, atol=1.5e-3)


@pytest.mark.parametrize("by_bits", [False, True])
@pytest.mark.parametrize("kv_dtype", FP8)
def test_fp8(kv_dtype: torch.dtype, by_bits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`by_bits`: as on chips for which Triton has no conversion from e4m3fn."""
    monkeypatch.setattr(arena_module, "_converts_e4m3fn", lambda: not by_bits)
    batch = tape_batch(MIXED[:2])
    batch.arena = (batch.arena.float() / 8).to(kv_dtype)
    check(batch, k_scale=8.0, v_scale=2.0)


def test_every_e4m3_value_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has one entry, so its output is that entry's V."""
    monkeypatch.setattr(arena_module, "_converts_e4m3fn", lambda: False)
    batch = tape_batch([Request(0, 0, 1)] * 4, layers=1, kv_heads=1, group=1)
    values = torch.arange(256, dtype=torch.uint8).view(4, 64)
    values[values & 0x7F == 0x7F] = 0  # NaN
    arena = torch.zeros(1, 2, 21, 1, 64, dtype=torch.uint8)
    arena[0, 1, batch.req_to_token[batch.req_pool_indices, 0].long(), 0] = values
    batch.arena = arena.view(torch.float8_e4m3fn)
    args = (batch.q, batch.arena, 0, batch.tables(), batch.scaling)
    out = ragged_decode_triton(*args, workspace=workspace_for(batch))
    assert torch.equal(out[:, 0], values.view(torch.float8_e4m3fn).half())


def test_arena_past_32_bits() -> None:
    """Entries lie past 2**31 elements; untouched memory is never committed."""
    layers, kv_heads, head_dim = 2, 2, 128
    slots = 2**31 // (layers * 2 * kv_heads * head_dim) + 2**20
    batch = tape_batch([Request(9, 20, 7)], head_dim=head_dim)
    small = batch.arena
    batch.arena = torch.empty(layers, 2, slots, kv_heads, head_dim, dtype=torch.float16)
    batch.arena[:, :, -small.shape[2] :] = small
    moved = batch.req_to_token < 2**30
    batch.req_to_token[moved] += slots - small.shape[2]
    assert batch.arena.numel() > 2**31
    check(batch)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q", torch.zeros(4, 8, 32, dtype=torch.float16)),
        ("q", torch.zeros(4, 8, 64, dtype=torch.float64)),
        ("arena", torch.zeros(2, 2, 9, 2, 64)),
        ("arena", torch.zeros(2, 2, 9, 2, 128, dtype=torch.float16)[..., ::2]),
        ("arena", torch.zeros(2, 2, 9, 2, 64, dtype=torch.uint8)),
        ("offsets", torch.zeros(5, 4, dtype=torch.int32)),
        ("budgets", torch.zeros(5, dtype=torch.int64)),
    ],
)
def test_refuses_bad_tensors(field: str, value: torch.Tensor) -> None:
    batch = tape_batch(MIXED)
    workspace = workspace_for(batch)
    setattr(batch, field, value)
    with pytest.raises(AssertionError):
        ragged_decode_triton(
            batch.q, batch.arena, 0, batch.tables(), batch.scaling, workspace=workspace
        )
