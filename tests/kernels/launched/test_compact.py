# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels.compact import compact_triton
from lava_sglang.kernels.reference import compact_ref
from tests.kernels.device import generator

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random_cut(columns: int, budget: int, g: torch.Generator) -> torch.Tensor:
    inner = torch.randint(0, columns * budget + 1, (columns - 1,), generator=g).sort().values
    return torch.tensor([0, *inner.tolist(), columns * budget], dtype=torch.int32)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    low, high = (0, 256) if dtype.itemsize == 1 else (-(2**15), 2**15)
    return torch.randint(low, high, shape, generator=g).to(BITS[dtype.itemsize]).view(dtype)


def check(
    layers: int,
    heads: int,
    head_dim: int,
    budget: int,
    *,
    dtype: torch.dtype = torch.float16,
    token_dtype: torch.dtype = torch.int32,
    offsets: torch.Tensor | None = None,
    seed: int = 0,
) -> None:
    g = generator(seed)
    prompt_len = 3 * budget + 5
    arena = random_bits((layers, 2, prompt_len + budget + 9, heads, head_dim), dtype, g)
    slots = torch.randperm(arena.shape[2], generator=g)
    src, dst = slots[:prompt_len], slots[prompt_len : prompt_len + budget]
    columns = layers * heads
    tokens = torch.randint(0, prompt_len, (columns * budget,), generator=g, dtype=token_dtype)
    if offsets is None:
        offsets = random_cut(columns, budget, g)
    got, want = arena.clone(), arena.clone()
    compact_triton(got, src, dst, tokens, offsets)
    compact_ref(want, src, dst, tokens, offsets)
    bits = BITS[dtype.itemsize]
    assert torch.equal(got.view(bits), want.view(bits))
    assert not torch.equal(got.view(bits), arena.view(bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_dtypes(dtype: torch.dtype, token_dtype: torch.dtype) -> None:
    check(3, 2, 64, 11, dtype=dtype, token_dtype=token_dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dim(head_dim: int) -> None:
    check(2, 3, head_dim, 7)


@pytest.mark.parametrize(
    ("layers", "heads", "budget"), [(1, 1, 1), (1, 1, 40), (4, 1, 1), (5, 3, 13), (2, 8, 4)]
)
def test_shape(layers: int, heads: int, budget: int) -> None:
    check(layers, heads, 64, budget, seed=budget)


@pytest.mark.parametrize(
    "offsets", [[0, 40, 40, 40, 40], [0, 0, 0, 0, 40], [0, 0, 1, 1, 40], [0, 39, 39, 40, 40]]
)
def test_empty_pieces(offsets: list[int]) -> None:
    check(2, 2, 64, 10, offsets=torch.tensor(offsets, dtype=torch.int32))


def test_arena_past_32_bits() -> None:
    slots = 2**31 // (2 * 2 * 2 * 128) + 2**20
    arena = torch.empty(2, 2, slots, 2, 128, dtype=torch.int16)
    assert arena.numel() > 2**31
    src, dst = torch.arange(slots - 30, slots), torch.arange(5) + slots - 50
    arena[:, :, src] = torch.randint(-(2**15), 2**15, (2, 2, 30, 2, 128)).short()
    tokens = torch.randint(0, 30, (20,), dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 15, 20], dtype=torch.int32)
    compact_triton(arena, src, dst, tokens, offsets)
    got = arena[:, :, dst].clone()
    compact_ref(arena, src, dst, tokens, offsets)
    assert torch.equal(got, arena[:, :, dst])


def test_refuses_a_tape_of_another_length() -> None:
    arena = torch.zeros(1, 2, 9, 2, 64)
    with pytest.raises(AssertionError):
        compact_triton(
            arena, torch.arange(3), torch.arange(3, 5), torch.zeros(5).int(), torch.zeros(3).int()
        )
