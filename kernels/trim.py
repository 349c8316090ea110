# SPDX-License-Identifier: Apache-2.0
"""Rewrites a tape: in place into fewer slots, or from other entries, through a staging buffer.

In place: the kept entries are in tape order, so entry i was at a place >= i. Two passes over them,
neither of which overwrites what it has not read: forwards, entry i to place i of the old columns;
backwards, to place i of the narrower columns. Place i of width b' is never at an earlier address
than place i of width b. One pass does where everything fits the staging buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lava_sglang.kernels.arena import as_bits, check_arena

SCORE_DTYPE = torch.bfloat16
"""Of the scores that are kept beside a tape, and chosen by when it is trimmed."""

STAGING_BYTES = 32 * 2**20
BLOCK_E = 32  # entries per program: 16 KB at head_dim 128 in bf16


def trim(
    arena: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    new_budget: int,
    staging_bytes: int = STAGING_BYTES,
) -> None:
    """Move the entries of a tape that stay into its first slots. Mutates `arena`, bit for bit.

    arena: [num_layers, 2, slots, num_kv_heads, head_dim], any dtype of 1, 2 or 4 bytes.
    slots: int64 [budget], row[P : P + b].
    places: int64 [num_layers * num_kv_heads * new_budget], the tape places that stay, ascending.
    new_budget: at most `budget`; the tape is then in slots[:new_budget].
    staging_bytes: size of the buffer that is allocated, at least one entry's.
    Reads nothing back to the host.
    """
    num_layers, _, _, num_kv_heads, head_dim = arena.shape
    budget, total = len(slots), num_layers * num_kv_heads * new_budget
    assert places.shape == (total,) and new_budget <= budget, (places.shape, total, budget)
    assert slots.dtype == places.dtype == torch.int64, (slots.dtype, places.dtype)
    bits = as_bits(arena)
    step = max(1, staging_bytes // (2 * head_dim * arena.dtype.itemsize))
    if total <= step:
        order = torch.arange(total, device=arena.device)
        _move(
            bits, tape_rows(bits, slots, places, budget), tape_rows(bits, slots, order, new_budget)
        )
        return
    starts = range(0, total, step)
    for start in starts:
        order = torch.arange(start, min(start + step, total), device=arena.device)
        kept = places[start : start + step]
        _move(bits, tape_rows(bits, slots, kept, budget), tape_rows(bits, slots, order, budget))
    for start in reversed(starts):
        order = torch.arange(start, min(start + step, total), device=arena.device)
        _move(
            bits, tape_rows(bits, slots, order, budget), tape_rows(bits, slots, order, new_budget)
        )


def refill(
    arena: torch.Tensor,
    source: torch.Tensor,
    slots: torch.Tensor,
    staging_bytes: int = STAGING_BYTES,
) -> None:
    """Fill a tape from anywhere outside its slots. Mutates `arena`, bit for bit.

    source: int64 [num_layers * num_kv_heads * budget], K rows as `tape_rows` counts them, in tape
    order. slots: int64 [budget], none of which the sources are in.
    """
    bits = as_bits(arena)
    step = max(1, staging_bytes // (2 * arena.shape[-1] * arena.dtype.itemsize))
    for start in range(0, len(source), step):
        order = torch.arange(start, min(start + step, len(source)), device=arena.device)
        _move(bits, source[start : start + step], tape_rows(bits, slots, order, len(slots)))


def tape_rows(
    arena: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, width: int
) -> torch.Tensor:
    """K rows of tape places where columns are `width` long, int64 [n]; V is a plane further."""
    return own_rows(arena, slots[places % width], places // width)


def own_rows(arena: torch.Tensor, slots: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """K rows of entries in their own columns, layer * num_kv_heads + head. int64 [n] all."""
    _, _, num_slots, num_kv_heads, _ = arena.shape
    plane = (columns // num_kv_heads) * (2 * num_slots)
    return (plane + slots) * num_kv_heads + columns % num_kv_heads


def _move(arena: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy entries, by their K rows int64 [n], as if all were read before any is written."""
    move = move_triton if arena.is_cuda else move_ref
    move(arena, source, target)


def move_ref(arena: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """`_move` in plain torch."""
    rows = arena.view(-1, arena.shape[-1])
    v_plane = arena.shape[2] * arena.shape[3]
    planes = torch.tensor([[0], [v_plane]], device=arena.device)
    rows[target + planes] = rows[source + planes]


def move_triton(arena: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """`_move` by the Triton kernel: into a staging buffer, and from there."""
    check_arena(arena)
    head_dim, count = arena.shape[-1], len(source)
    staging = torch.empty(2, count, head_dim, dtype=arena.dtype, device=arena.device)
    v_plane = arena.shape[2] * arena.shape[3]
    for entries, store in ((source, False), (target, True)):
        _stage[(triton.cdiv(count, BLOCK_E),)](
            arena,
            staging,
            entries,
            v_plane,
            count,
            STORE=store,
            D=head_dim,
            BLOCK_E=BLOCK_E,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["v_plane", "count"])
def _stage(
    arena_ptr,  # rows of D
    staging_ptr,  # [2, count, D]
    entries_ptr,  # int64 [count]
    v_plane,  # rows between an entry's K and V
    count,
    STORE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = i < count
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    k_row = tl.load(entries_ptr + i, mask=live, other=0)
    v_row = k_row + v_plane
    staged_v = i + count
    if STORE:
        k = tl.load(staging_ptr + (i * D)[:, None] + d[None, :], mask=mask)
        v = tl.load(staging_ptr + (staged_v * D)[:, None] + d[None, :], mask=mask)
        tl.store(arena_ptr + (k_row * D)[:, None] + d[None, :], k, mask=mask)
        tl.store(arena_ptr + (v_row * D)[:, None] + d[None, :], v, mask=mask)
    else:
        k = tl.load(arena_ptr + (k_row * D)[:, None] + d[None, :], mask=mask)
        v = tl.load(arena_ptr + (v_row * D)[:, None] + d[None, :], mask=mask)
        tl.store(staging_ptr + (i * D)[:, None] + d[None, :], k, mask=mask)
        tl.store(staging_ptr + (staged_v * D)[:, None] + d[None, :], v, mask=mask)
