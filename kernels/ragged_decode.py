# SPDX-License-Identifier: Apache-2.0
"""Decode attention where each head reads its own number of entries: prefix, tape piece, tail.

Flash-decoding in two kernels. `_attend` gives each program one chunk of one head's entries and
leaves a normalised partial output with its log-sum-exp; `_merge` adds the partials up. A chunk is
sized so that all heads of the batch together fill the device once: a long head gets more of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lava_sglang.kernels.arena import (
    FP8_DTYPES,
    capped,
    check_arena,
    entry_offset,
    load_entries,
    loadable,
)
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.reference import ragged_decode_ref

LOG2E = 1.4426950408889634
MAX_GROUP = 16  # query heads of a KV head: the rows of one tile
MIN_SPLITS = 4
MAX_ENTRIES = 2**31 - 1  # of a head: what the lengths can count
MERGE_SPLITS = 16  # most partials per iteration of the merge


class DecodeWorkspace:
    """Scratch of `ragged_decode` at fixed addresses, so that a CUDA graph may capture it.

    One serves all layers of a model, one after the other.
    """

    def __init__(
        self,
        max_bs: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        num_programs: int | None = None,
        max_splits: int = 64,
        min_chunk: int = 128,
        allocate: bool = True,
    ):
        """
        max_bs: largest batch. max_splits: most chunks of one head, a power of two from 4.
        num_programs: chunks wanted over the whole batch; default 4 for each multiprocessor.
        min_chunk: entries below which a head is not split further.
        allocate: False for the size alone.
        """
        assert max_splits >= MIN_SPLITS and max_splits & (max_splits - 1) == 0, (
            f"max_splits={max_splits}: a power of two from {MIN_SPLITS} up"
        )
        if num_programs is None:
            num_programs = 4 * _multiprocessors(torch.device(device))
        self.max_bs = max_bs
        self.num_qo_heads = num_qo_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_programs = num_programs
        self.max_splits = max_splits
        self.min_chunk = min_chunk
        rows = max(bs * self.splits(bs) for bs in range(1, max_bs + 1)) * num_qo_heads
        device = device if allocate else "meta"
        self.partial = torch.empty(rows * head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(rows, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self.partial.nbytes + self.lse.nbytes

    def splits(self, bs: int) -> int:
        """Chunks that a head may have in a batch of `bs`: a constant of the captured graph.

        Four times the mean share, since heads differ in length; unused ones exit at once.
        """
        share = triton.cdiv(4 * self.num_programs, bs * self.num_kv_heads)
        return min(self.max_splits, max(MIN_SPLITS, triton.next_power_of_2(share)))


def shape_reasons(num_qo_heads: int, num_kv_heads: int) -> list[str]:
    """What the kernel does not take of a model, one sentence each."""
    if num_qo_heads % num_kv_heads:
        return [f"{num_qo_heads} query heads over {num_kv_heads} KV heads: accepts a multiple"]
    group = num_qo_heads // num_kv_heads
    if group > MAX_GROUP:
        return [f"{group} query heads per KV head: the decode kernel accepts up to {MAX_GROUP}"]
    return []


def ragged_decode(
    q: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: BatchTables,
    scaling: float,
    out: torch.Tensor | None = None,
    *,
    sliding_window: int = 0,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    workspace: DecodeWorkspace,
) -> torch.Tensor:
    """Attention of one new token per request, over what each of its heads keeps.

    q: [bs, num_qo_heads, head_dim] fp16, bf16 or fp32, after RoPE; the batch stride is free.
    arena: [num_layers, 2, slots, num_kv_heads, head_dim], K and V, in q's dtype or fp8.
    tables: where each request's entries are.
    scaling: factor on the logits. logit_cap: as of `reference.capped_ref`.
    sliding_window: a head attends to the last so many of its prefix, piece and tail; 0: to all.
    k_scale, v_scale: what the entries were divided by (fp8).
    workspace: made for this model and at least this batch. Mutated.
    out: [bs, num_qo_heads, head_dim] contiguous, allocated if None. Mutated.
    Returns `out`. A head without entries gives zeros. Reads nothing back to the host.
    """
    run = ragged_decode_triton if q.is_cuda else _on_cpu
    return run(
        q, arena, layer, tables, scaling, out=out, sliding_window=sliding_window,
        logit_cap=logit_cap, k_scale=k_scale, v_scale=v_scale, workspace=workspace,
    )  # fmt: skip


def ragged_decode_triton(
    q: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: BatchTables,
    scaling: float,
    out: torch.Tensor | None = None,
    *,
    sliding_window: int = 0,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    workspace: DecodeWorkspace,
) -> torch.Tensor:
    """`ragged_decode` by the Triton kernels."""
    req_to_token, req_pool_indices, seq_lens, prefix_lens, budgets, offsets = tables
    num_layers, slots, num_kv_heads, head_dim = check_arena(arena)
    bs, num_qo_heads, _ = q.shape
    group = num_qo_heads // num_kv_heads
    assert q.shape[2] == head_dim and q.stride()[1:] == (head_dim, 1), (q.shape, q.stride())
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32), q.dtype
    assert arena.dtype in (q.dtype, *FP8_DTYPES), (arena.dtype, q.dtype)
    assert not shape_reasons(num_qo_heads, num_kv_heads), (num_qo_heads, num_kv_heads)
    assert 0 <= layer < num_layers, f"layer={layer} of {num_layers}"
    assert 0 < bs <= workspace.max_bs, f"bs={bs}: the workspace holds {workspace.max_bs}"
    assert (workspace.num_qo_heads, workspace.head_dim) == (num_qo_heads, head_dim)
    assert workspace.num_kv_heads == num_kv_heads
    assert req_pool_indices.shape == seq_lens.shape == (bs,)
    assert req_pool_indices.is_contiguous() and seq_lens.is_contiguous()
    assert req_to_token.dtype == offsets.dtype == prefix_lens.dtype == budgets.dtype == torch.int32
    assert offsets.shape[1] == num_layers * num_kv_heads + 1, offsets.shape
    assert req_to_token.stride(1) == offsets.stride(1) == 1
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.shape == q.shape and out.is_contiguous(), (out.shape, out.stride())

    data, e4m3_bits, factor = loadable(arena)
    splits = workspace.splits(bs)
    block_d = triton.next_power_of_2(head_dim)
    _attend[(bs, num_kv_heads, splits)](
        q,
        data,
        workspace.partial,
        workspace.lse,
        req_to_token,
        req_pool_indices,
        seq_lens,
        prefix_lens,
        budgets,
        offsets,
        scaling * k_scale * factor * LOG2E,
        logit_cap * LOG2E,
        bs,
        layer,
        slots,
        sliding_window or MAX_ENTRIES,
        workspace.min_chunk,
        workspace.num_programs,
        q.stride(0),
        req_to_token.stride(0),
        offsets.stride(0),
        H=num_kv_heads,
        G=group,
        D=head_dim,
        SPLITS=splits,
        BLOCK_BS=max(128, triton.next_power_of_2(bs)),
        BLOCK_G=16,
        BLOCK_D=block_d,
        # Entries per iteration: 32 KB of K and V at head_dim 128; float32 spills with 32. Twice as
        # many in half precision is never slower on an H100, more stages are: docs/h100.md.
        BLOCK_N=16 if q.dtype == torch.float32 else 64,
        CAPPED=logit_cap > 0,
        E4M3_BITS=e4m3_bits,
        num_warps=4 if block_d <= 128 else 8,
        num_stages=2,
    )
    _merge[(bs, num_qo_heads)](
        workspace.partial,
        workspace.lse,
        out,
        v_scale * factor,
        HQ=num_qo_heads,
        D=head_dim,
        SPLITS=splits,
        BLOCK_S=min(splits, MERGE_SPLITS),
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def _on_cpu(
    *args: Any, out: torch.Tensor | None, workspace: DecodeWorkspace, **options: Any
) -> torch.Tensor:
    result = ragged_decode_ref(*args, **options)
    return result if out is None else out.copy_(result)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(
    do_not_specialize=["bs", "layer", "slots", "sliding_window", "min_chunk", "num_programs"]
)
def _attend(
    q_ptr,  # [bs, H * G, D]
    arena_ptr,
    partial_ptr,  # float32 [bs, H * G, SPLITS, D]
    lse_ptr,  # float32 [bs, H * G, SPLITS], base 2
    req_to_token_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    prefix_lens_ptr,
    budgets_ptr,
    offsets_ptr,
    qk_scale,  # to the base-2 logarithm
    logit_cap,  # to the base-2 logarithm
    bs,
    layer,
    slots,
    sliding_window,
    min_chunk,
    num_programs,
    q_stride,
    row_stride,
    offsets_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_BS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    row = tl.load(req_pool_indices_ptr + request).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int32)
    prefix_len = tl.load(prefix_lens_ptr + row)
    budget = tl.load(budgets_ptr + row)

    # The head reads [0, prefix_len) of the row, [piece, piece + kept) of the tape, then the tail.
    own_column = layer * H + kv_head
    piece_ptr = offsets_ptr + row * offsets_stride + own_column
    piece = tl.load(piece_ptr)
    kept = tl.where(budget > 0, tl.load(piece_ptr + 1) - piece, 0)
    total = tl.maximum(seq_len - budget + kept, 0)
    attended = tl.minimum(total, sliding_window)

    begin, end = _chunk(
        split, attended, seq_lens_ptr, bs, sliding_window, min_chunk, num_programs,
        H, SPLITS, BLOCK_BS, BLOCK_N,
    )  # fmt: skip
    begin += total - attended
    end += total - attended
    g = tl.arange(0, BLOCK_G)
    q_head = kv_head.to(tl.int64) * G + g
    partial = (request * (H * G) + q_head) * SPLITS + split
    if begin >= end:
        tl.store(lse_ptr + partial, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=g < G)
        return

    d = tl.arange(0, BLOCK_D)
    head_mask = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(
        q_ptr + request * q_stride + q_head[:, None] * D + d[None, :], mask=head_mask, other=0.0
    )
    if arena_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        # Eight bits become a half in one instruction, exactly, and bfloat16 in three: 0.85 times
        # the time on an H100. A query of a model that works at all fits a half.
        q = q.to(tl.float16)
    v_plane = slots.to(tl.int64) * (H * D)
    row_ptr = req_to_token_ptr + row * row_stride
    columns_are = tl.maximum(budget, 1)  # places long
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        live = entry < end
        on_tape = (entry >= prefix_len) & (entry < prefix_len + kept)
        place = piece + (entry - prefix_len)
        position = tl.where(
            on_tape,
            prefix_len + place % columns_are,
            tl.where(entry < prefix_len, entry, entry - kept + budget),
        )
        column = tl.where(on_tape, place // columns_are, own_column)
        slot = tl.load(row_ptr + position, mask=live, other=0).to(tl.int64)
        k_offset = entry_offset(column // H, slot, column % H, slots, H, D)
        k = load_entries(arena_ptr, k_offset, live, D, BLOCK_D, E4M3_BITS, q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        if CAPPED:
            logits = capped(logits, logit_cap)
        logits = tl.where(live[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(logits - new_top[:, None])
        weight = weight * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_entries(arena_ptr, k_offset + v_plane, live, D, BLOCK_D, E4M3_BITS, q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
        top = new_top

    tl.store(lse_ptr + partial, top + tl.log2(weight), mask=g < G)
    tl.store(partial_ptr + partial[:, None] * D + d[None, :], acc / weight[:, None], mask=head_mask)


@triton.jit
def _chunk(
    split,
    attended,
    seq_lens_ptr,
    bs,
    sliding_window,
    min_chunk,
    num_programs,
    H: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_BS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Chunk number `split` of the entries that a head attends to, [begin, end) in int32; may be
    empty."""
    # One load and no loop: Triton 3.8 loses the alignment of a loop's loads behind another loop.
    r = tl.arange(0, BLOCK_BS)
    lens = tl.load(seq_lens_ptr + r, mask=r < bs, other=0).to(tl.int64)
    lens = tl.minimum(lens, sliding_window)
    # The mean of a request's heads is its seq_len, since the tape holds b entries a head.
    share = tl.cdiv(tl.sum(lens) * H, num_programs)
    chunk = tl.maximum(share, min_chunk)
    num_chunks = tl.minimum(tl.cdiv(attended, chunk), SPLITS)
    chunk = tl.cdiv(tl.cdiv(attended, tl.maximum(num_chunks, 1)), BLOCK_N) * BLOCK_N
    begin = split * chunk
    end = tl.minimum(begin + chunk, attended)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _merge(
    partial_ptr,  # float32 [bs, HQ, SPLITS, D]
    lse_ptr,  # float32 [bs, HQ, SPLITS], base 2, -inf where there is no partial
    out_ptr,  # [bs, HQ, D]
    v_scale,
    HQ: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * HQ + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + head * SPLITS + tl.arange(0, SPLITS))
    top = tl.maximum(tl.max(lse, 0), -1e30)
    weight = tl.sum(tl.exp2(lse - top), 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        split = head * SPLITS + first + tl.arange(0, BLOCK_S)
        factor = tl.exp2(tl.load(lse_ptr + split) - top)
        mask = (factor > 0)[:, None] & (d < D)[None, :]
        rows = tl.load(partial_ptr + split[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc += tl.sum(rows * factor[:, None], 0)
    acc = acc * (v_scale / tl.maximum(weight, 1e-30))
    tl.store(out_ptr + head * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
