# SPDX-License-Identifier: Apache-2.0
"""Chooses the best entries of each layer across its heads, and lays their tokens on the tape.

Radix select: the float32 scores become unsigned keys of the same order, and four passes over
them find, eight bits a pass, the key of the last entry kept. Each pass counts the keys that share
the digits found so far, per head: `max(floor, entries of the head at or above a key)`, summed over
heads, says which digit comes next, so a floor per head costs nothing. Counts are integers: the
result does not depend on the order of atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK_M = 1024
DIGITS = 4  # of eight bits


class Selection(NamedTuple):
    """What a request keeps, as the tape holds it."""

    counts: torch.Tensor  # int32 [num_layers, num_kv_heads], window included
    offsets: torch.Tensor  # int32 [num_layers * num_kv_heads + 1], first tape place of each head
    tape_tokens: torch.Tensor  # int32 [num_layers * num_kv_heads * budget], ascending in a head


def select(
    scores: torch.Tensor,
    layer_counts: torch.Tensor,
    budget: int,
    first_token: int,
    window_size: int,
    head_floor: int | torch.Tensor = 0,
) -> Selection:
    """Keep the layer_counts[l] best scored entries of each layer, and the window of every head.

    scores: float32 [num_layers, num_kv_heads, tokens], contiguous; higher is kept first, ties go
    to the lower (head, token).
    layer_counts: integer [num_layers] on the scores' device, at most num_kv_heads * tokens each,
    with the sum num_layers * num_kv_heads * (budget - window_size), which is not checked.
    budget: b, window included. first_token: P, the prompt token of the first score.
    window_size: w; the window's tokens follow the scored ones.
    head_floor: scored entries that every head keeps at least, or an integer [num_layers] of
    them; lowered to what the layer's count and the tokens allow. AdaKV's (arXiv 2407.11550) floor.
    Reads nothing back to the host on a GPU.
    """
    run = select_triton if scores.is_cuda else _on_cpu
    return run(scores, layer_counts, budget, first_token, window_size, head_floor)


def select_triton(
    scores: torch.Tensor,
    layer_counts: torch.Tensor,
    budget: int,
    first_token: int,
    window_size: int,
    head_floor: int | torch.Tensor = 0,
) -> Selection:
    """`select` by the Triton kernels."""
    floors = _check(scores, layer_counts, head_floor)
    num_layers, num_kv_heads, num_scored = scores.shape
    columns = num_layers * num_kv_heads
    counts, above, last_key = _threshold(scores, layer_counts, floors)
    if isinstance(head_floor, torch.Tensor) or head_floor > 0:
        # A floor may end a head's entries below the layer's key: find each head's own.
        rows = scores.view(columns, 1, num_scored)
        counts, above, last_key = _threshold(rows, counts.view(-1), torch.zeros_like(counts))
    else:
        last_key = last_key.repeat_interleave(num_kv_heads)
    counts = counts.view(num_layers, num_kv_heads)
    kept = counts + window_size
    offsets = torch.zeros(columns + 1, dtype=torch.int32, device=scores.device)
    torch.cumsum(kept.view(-1), 0, dtype=torch.int32, out=offsets[1:])
    tape_tokens = torch.empty(columns * budget, dtype=torch.int32, device=scores.device)
    _write_tape[(columns,)](
        scores,
        last_key,
        above,
        counts,
        offsets,
        tape_tokens,
        num_scored,
        first_token,
        window_size,
        len(tape_tokens),
        BLOCK_M=BLOCK_M,
        BLOCK_W=triton.next_power_of_2(max(window_size, 1)),
        num_warps=4,
    )
    return Selection(kept, offsets, tape_tokens)


def _threshold(
    scores: torch.Tensor, counts: torch.Tensor, floors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last key kept of each row of [rows, segments, tokens], `counts` entries a row.

    Returns int32 [rows, segments] entries kept, the same of entries above the key, and the key as
    int32 bits [rows].
    """
    rows, segments, num_scored = scores.shape
    zeros = torch.zeros(
        rows * segments * (256 * DIGITS + 2) + rows, dtype=torch.int32, device=scores.device
    )
    kept, above, key, histogram = zeros.split(
        [rows * segments, rows * segments, rows, DIGITS * rows * segments * 256]
    )
    for shift, found in zip((24, 16, 8, 0), histogram.view(DIGITS, -1), strict=True):
        _count_digits[(triton.cdiv(num_scored, BLOCK_M), segments, rows)](
            scores, key, found, num_scored, shift, BLOCK_M=BLOCK_M, num_warps=4
        )
        _next_digit[(rows,)](
            found,
            counts,
            floors,
            key,
            above,
            kept,
            num_scored,
            shift,
            SEGMENTS=segments,
            BLOCK_S=triton.next_power_of_2(segments),
            num_warps=4 if segments <= 8 else 8,
        )
    return kept.view(rows, segments), above.view(rows, segments), key


def _on_cpu(
    scores: torch.Tensor,
    layer_counts: torch.Tensor,
    budget: int,
    first_token: int,
    window_size: int,
    head_floor: int | torch.Tensor = 0,
) -> Selection:
    floors = _check(scores, layer_counts, head_floor)
    num_layers, num_kv_heads, num_scored = scores.shape
    # The kernels' keys, as signed integers: exact sums whatever the scores are.
    bits = (scores + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    kept = torch.zeros(keys.shape, dtype=torch.bool)
    limits = zip(layer_counts.tolist(), floors.tolist(), strict=True)
    for layer, (count, floor) in enumerate(limits):
        floor = min(floor, count // num_kv_heads, num_scored)
        for head in range(num_kv_heads if floor else 0):
            _keep_best(keys[layer, head], kept[layer, head], floor)
        _keep_best(keys[layer].view(-1), kept[layer].view(-1), count - num_kv_heads * floor)
    window = torch.ones(num_layers, num_kv_heads, window_size, dtype=torch.bool)
    kept = torch.cat([kept, window], dim=-1)
    counts = kept.sum(dim=-1, dtype=torch.int32)
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(counts.view(-1), 0, dtype=torch.int32, out=offsets[1:])
    tape_tokens = kept.nonzero()[:, 2].int() + first_token
    return Selection(counts, offsets, tape_tokens)


def _keep_best(keys: torch.Tensor, kept: torch.Tensor, count: int) -> None:
    """Mark the `count` best keys not marked yet, ties to the lower index. Mutates `kept`."""
    if count == 0:
        return
    free = (~kept).nonzero().view(-1) if kept.any() else slice(None)
    candidates = keys[free]
    last = candidates.kthvalue(len(candidates) - count + 1).values
    best = candidates > last
    ties = candidates == last
    best |= ties & (ties.cumsum(0) <= count - best.sum())
    kept[free] = best


def _check(
    scores: torch.Tensor, layer_counts: torch.Tensor, head_floor: int | torch.Tensor
) -> torch.Tensor:
    """Returns the floors as an integer tensor [num_layers] on the scores' device."""
    assert scores.dtype == torch.float32 and scores.is_contiguous(), scores.dtype
    num_layers = scores.shape[0]
    assert layer_counts.shape == (num_layers,) and not layer_counts.is_floating_point()
    if not isinstance(head_floor, torch.Tensor):
        return torch.full((num_layers,), head_floor, dtype=torch.int32, device=scores.device)
    assert head_floor.shape == (num_layers,) and not head_floor.is_floating_point()
    return head_floor


@triton.jit
def _key(score):
    """An unsigned integer in the order of the score; +0 and -0 are the same."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -1, -2147483648)
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["num_scored", "shift"])
def _count_digits(
    scores_ptr,  # [rows, segments, num_scored]
    key_ptr,  # [rows], the digits found so far, above bit shift + 8
    histogram_ptr,  # [rows, segments, 256]
    num_scored,
    shift,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(2)
    segment = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = i < num_scored
    key = _key(tl.load(scores_ptr + segment * num_scored + i, mask=live, other=0.0))
    found = tl.load(key_ptr + row).to(tl.uint32, bitcast=True)
    # The first pass has found nothing: two shifts, since one by 32 is undefined.
    live &= ((key ^ found) >> shift >> 8) == 0
    digit = ((key >> shift) & 255).to(tl.int32)
    counts = tl.histogram(digit, 256, mask=live)
    bins = tl.arange(0, 256)
    tl.atomic_add(histogram_ptr + segment * 256 + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_scored", "shift"])
def _next_digit(
    histogram_ptr,  # [rows, SEGMENTS, 256], of the keys that share the digits found
    counts_ptr,  # [rows]
    floors_ptr,  # [rows]
    key_ptr,  # [rows]
    above_ptr,  # [rows, SEGMENTS], keys above those that share the digits found
    kept_ptr,  # [rows, SEGMENTS], right after the last digit
    num_scored,
    shift,
    SEGMENTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row).to(tl.int32)
    floor = tl.load(floors_ptr + row).to(tl.int32)
    floor = tl.minimum(tl.minimum(floor, count // SEGMENTS), num_scored)
    s = tl.arange(0, BLOCK_S)
    valid = s < SEGMENTS
    segment = row * SEGMENTS + s
    bins = tl.arange(0, 256)
    histogram = tl.load(
        histogram_ptr + segment[:, None] * 256 + bins[None, :], mask=valid[:, None], other=0
    )
    above = tl.load(above_ptr + segment, mask=valid, other=0)

    # Entries kept if the key ends in a digit, by digit: falls from at least `count` on.
    from_digit = above[:, None] + tl.cumsum(histogram, 1, reverse=True)
    kept = tl.where(valid[:, None], tl.maximum(from_digit, floor), 0)
    digit = tl.sum((tl.sum(kept, 0) >= count).to(tl.int32), 0) - 1
    above += tl.sum(tl.where(bins[None, :] > digit, histogram, 0), 1)
    tl.store(above_ptr + segment, above, mask=valid)
    tl.store(key_ptr + row, tl.load(key_ptr + row) | (digit << shift))
    # The entries that equal the key fill what is left, lower segments first.
    equal = tl.sum(tl.where(bins[None, :] == digit, histogram, 0), 1)
    sure = tl.where(valid, tl.maximum(above, floor), 0)
    room = tl.where(valid, tl.maximum(above + equal - sure, 0), 0)
    left = count - tl.sum(sure, 0) - (tl.cumsum(room, 0) - room)
    taken = tl.minimum(tl.maximum(left, 0), room)
    tl.store(kept_ptr + segment, sure + taken, mask=valid)


@triton.jit(do_not_specialize=["num_scored", "first_token", "window_size", "tape_len"])
def _write_tape(
    scores_ptr,  # [columns, num_scored]
    last_key_ptr,  # [columns]
    above_ptr,  # [columns], entries above the last key
    counts_ptr,  # [columns], scored entries kept
    offsets_ptr,  # [columns + 1]
    tape_tokens_ptr,
    num_scored,
    first_token,
    window_size,
    tape_len,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    last_key = tl.load(last_key_ptr + column).to(tl.uint32, bitcast=True)
    count = tl.load(counts_ptr + column)
    ties = count - tl.load(above_ptr + column)  # entries that equal the last key and are kept
    place = tl.load(offsets_ptr + column)
    window_place = place + count
    row_ptr = scores_ptr + column * num_scored
    for first in range(0, num_scored, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        live = i < num_scored
        key = _key(tl.load(row_ptr + i, mask=live, other=0.0))
        tied = (live & (key == last_key)).to(tl.int32)
        tie_rank = tl.cumsum(tied, 0)
        kept = (live & (key > last_key)) | ((tied > 0) & (tie_rank <= ties))
        rank = tl.cumsum(kept.to(tl.int32), 0)
        at = place + rank - 1
        tl.store(tape_tokens_ptr + at, first_token + i, mask=kept & (at < tape_len))
        place += tl.sum(kept.to(tl.int32), 0)
        ties -= tl.sum(tied, 0)
    t = tl.arange(0, BLOCK_W)
    at = window_place + t
    mask = (t < window_size) & (at < tape_len)
    tl.store(tape_tokens_ptr + at, first_token + num_scored + t, mask=mask)
