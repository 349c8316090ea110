# SPDX-License-Identifier: Apache-2.0
"""Copies the entries that each head keeps onto the tape."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lava_sglang.kernels.arena import as_bits, check_arena, entry_offset
from lava_sglang.kernels.reference import compact_ref

BLOCK_E = 32  # tape places per program: 16 KB read and written at head_dim 128 in bf16


def compact(
    arena: torch.Tensor,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    tape_tokens: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Fill the tape of one request from its exact prompt. Mutates `arena`, bit for bit.

    arena: [num_layers, 2, slots, num_kv_heads, head_dim], any dtype of 1, 2 or 4 bytes.
    src_slots: int64 [prompt_len], the slot of each prompt token.
    dst_slots: int64 [budget], row[P : P + b]; no slot of src_slots.
    tape_tokens: int32 or int64 [num_layers * num_kv_heads * budget], the prompt token at each
    place of the tape.
    offsets: int32 [num_layers * num_kv_heads + 1], first tape place of each (layer, head), which
    is where an entry's source lies; the destination follows from the place alone.
    Reads nothing back to the host.
    """
    run = compact_triton if arena.is_cuda else compact_ref
    run(arena, src_slots, dst_slots, tape_tokens, offsets)


def compact_triton(
    arena: torch.Tensor,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    tape_tokens: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """`compact` by the Triton kernel."""
    num_layers, slots, num_kv_heads, head_dim = check_arena(arena)
    columns, budget = num_layers * num_kv_heads, len(dst_slots)
    assert tape_tokens.shape == (columns * budget,), (tape_tokens.shape, columns, budget)
    assert offsets.shape == (columns + 1,), (offsets.shape, columns)
    assert src_slots.dtype == dst_slots.dtype == torch.int64, (src_slots.dtype, dst_slots.dtype)
    assert offsets.dtype == torch.int32 and tape_tokens.dtype in (torch.int32, torch.int64)
    assert all(t.is_contiguous() for t in (src_slots, dst_slots, tape_tokens, offsets))
    _copy[(triton.cdiv(len(tape_tokens), BLOCK_E),)](
        as_bits(arena),
        src_slots,
        dst_slots,
        tape_tokens,
        offsets,
        slots,
        budget,
        COLUMNS=columns,
        SEARCH_STEPS=columns.bit_length(),
        H=num_kv_heads,
        D=head_dim,
        BLOCK_E=BLOCK_E,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["slots", "budget"])
def _copy(
    arena_ptr,
    src_slots_ptr,
    dst_slots_ptr,
    tape_tokens_ptr,
    offsets_ptr,
    slots,
    budget,
    COLUMNS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = place < budget.to(tl.int64) * COLUMNS

    # The owner: the last column whose piece starts at or before the place. Empty pieces share
    # their start with the next one, which comes later.
    owner = tl.zeros([BLOCK_E], tl.int32)
    beyond = tl.full([BLOCK_E], COLUMNS, tl.int32)
    for _ in range(SEARCH_STEPS):
        middle = (owner + beyond) // 2
        starts = tl.load(offsets_ptr + middle) <= place
        owner = tl.where(starts, middle, owner)
        beyond = tl.where(starts, beyond, middle)

    token = tl.load(tape_tokens_ptr + place, mask=live, other=0).to(tl.int64)
    src_slot = tl.load(src_slots_ptr + token, mask=live, other=0)
    src = entry_offset(owner // H, src_slot, owner % H, slots, H, D)
    column = place // budget
    dst_slot = tl.load(dst_slots_ptr + place % budget, mask=live, other=0)
    dst = entry_offset(column // H, dst_slot, column % H, slots, H, D)

    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    v_plane = slots.to(tl.int64) * (H * D)
    k = tl.load(arena_ptr + src[:, None] + d[None, :], mask=mask)
    v = tl.load(arena_ptr + (src + v_plane)[:, None] + d[None, :], mask=mask)
    tl.store(arena_ptr + dst[:, None] + d[None, :], k, mask=mask)
    tl.store(arena_ptr + (dst + v_plane)[:, None] + d[None, :], v, mask=mask)
