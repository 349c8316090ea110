# SPDX-License-Identifier: Apache-2.0
"""Where an entry lives in the arena, and how its bytes become numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import driver

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
"""Entries of 8 bits: a number is the entry times its layer's k_scale or v_scale."""


MAX_HEAD_DIM = 256


def head_dim_reasons(head_dim: int) -> list[str]:
    """What no kernel takes, one sentence."""
    if head_dim % 16 == 0 and 0 < head_dim <= MAX_HEAD_DIM:
        return []
    return [f"head_dim={head_dim}: the kernels accept multiples of 16 up to {MAX_HEAD_DIM}"]


def check_arena(arena: torch.Tensor) -> tuple[int, int, int, int]:
    """Assert the layout every kernel addresses by. Returns (num_layers, slots, H, D)."""
    assert arena.dim() == 5 and arena.shape[1] == 2, (
        f"arena is {tuple(arena.shape)}, not [L, 2, slots, H, D]"
    )
    assert arena.is_contiguous(), f"arena has strides {arena.stride()}, not contiguous"
    num_layers, _, slots, num_kv_heads, head_dim = arena.shape
    assert not head_dim_reasons(head_dim), head_dim_reasons(head_dim)
    return num_layers, slots, num_kv_heads, head_dim


def as_bits(arena: torch.Tensor) -> torch.Tensor:
    """The arena as integers of its entries' size, for kernels that only move them."""
    return arena.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[arena.dtype.itemsize])


def loadable(arena: torch.Tensor) -> tuple[torch.Tensor, bool, float]:
    """How a kernel reads an arena: (what to point at, E4M3_BITS, factor on each value).

    Triton converts e4m3fn from sm_89 on. Before, `load_entries` builds a half from the bits, which
    is the value / 256: the caller multiplies its scale by the factor.
    """
    if arena.dtype == torch.float8_e4m3fn and not _converts_e4m3fn():
        return arena.view(torch.uint8), True, 256.0
    return arena, False, 1.0


def _converts_e4m3fn() -> bool:
    if triton.knobs.runtime.interpret:
        return True
    target = driver.active.get_current_target()
    return target.backend != "cuda" or target.arch >= 89


@triton.jit
def capped(logits, cap):
    """`reference.capped_ref`, cap above 0. By exp2, which every target and the interpreter have."""
    # tanh(x) = (1 - t) / (1 + t) with t = exp(-2 x), x >= 0.
    t = tl.exp2(tl.abs(logits) * (-2 * 1.4426950408889634 / cap))
    tanh = (1 - t) / (1 + t)
    return cap * tl.where(logits < 0, -tanh, tanh)


@triton.jit
def entry_place(layer, slot, head, slots, H: tl.constexpr):
    """The K row of an entry among all rows, int64; its V row is `slots * H` rows further."""
    plane = layer.to(tl.int64) * 2
    return (plane * slots + slot) * H + head


@triton.jit
def entry_offset(layer, slot, head, slots, H: tl.constexpr, D: tl.constexpr):
    """Element offset of the K row of an entry, int64; its V row is `slots * H * D` further."""
    return entry_place(layer, slot, head, slots, H) * D


@triton.jit
def load_entries(
    arena_ptr,
    offset,  # int64 [BLOCK_N], of each row
    live,  # bool [BLOCK_N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E4M3_BITS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows of the arena, [BLOCK_N, BLOCK_D] in `dtype`, zero where not live or past D."""
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    rows = tl.load(arena_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)
    if E4M3_BITS:
        # s eeee mmm -> s 0eeee mmm0000000: a half whose exponent is 8 too small.
        bits = rows.to(tl.int16)
        rows = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return rows.to(dtype)
