# SPDX-License-Identifier: Apache-2.0
"""Scores a prompt's entries by the attention that its last tokens pay them.

Softmax needs its sum over all tokens before any probability is known, so K is read twice:
`_softmax_sums` leaves one log-sum-exp per query and `_mean_attention` the mean over the window.
V is read once, by `_mean_attention` for the norm of each token or by `_value_norm` for the
largest of a head; `_pool` takes neighbours and groups together. Nothing of size [window, prompt]
is written.
"""

from __future__ import annotations

from typing import NamedTuple

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
from lava_sglang.kernels.reference import window_scores_ref
from lava_sglang.kernels.score_options import LAVA, ScoreOptions

LOG2E = 1.4426950408889634
SCRATCH_BYTES = 64 << 20  # attention of the layers that are worked on together
NUM_PROGRAMS = 1024  # wanted of `_softmax_sums`, which is split over the prompt to get there


def window_scores(
    queries: torch.Tensor,
    arena: torch.Tensor,
    prompt_slots: torch.Tensor,
    shared_prefix_len: int,
    window_size: int,
    scaling: float | torch.Tensor,
    options: ScoreOptions = LAVA,
    *,
    layers: torch.Tensor | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Importance of each scored entry: those of the suffix before its observation window.

    queries: [num_layers, window queries, num_qo_heads, head_dim], after RoPE, of the last tokens
    of the prompt; at most window_size of them, fewer if the prefix covers part of the window.
    arena: [arena layers, 2, slots, num_kv_heads, head_dim] in the queries' dtype or fp8.
    layers: int64 [num_layers], the arena's layer of each of the queries'; None: the same.
    prompt_slots: int64 [prompt_len]. shared_prefix_len, window_size: P and w, in tokens.
    scaling: factor on the logits, or float32 [num_layers]. It includes the k_scale of an fp8
    arena; a layer's v_scale has no effect on the order within the layer, nor on its entropy.
    logit_cap: as of `reference.capped_ref`.
    options: how attention becomes a score.
    Returns float32 [num_layers, num_kv_heads, prompt_len - P - w], all finite: attention, and the
    norm of a value, that is infinite or not a number counts as 0. Reads nothing back to the host.
    Source: LAVa, arXiv 2509.09754 (max, head); SnapKV, arXiv 2404.14469 (mean, none).
    """
    run = window_scores_triton if arena.is_cuda else window_scores_ref
    return run(
        queries, arena, prompt_slots, shared_prefix_len, window_size, scaling, options,
        layers=layers, logit_cap=logit_cap,
    )  # fmt: skip


def window_scores_triton(
    queries: torch.Tensor,
    arena: torch.Tensor,
    prompt_slots: torch.Tensor,
    shared_prefix_len: int,
    window_size: int,
    scaling: float | torch.Tensor,
    options: ScoreOptions = LAVA,
    *,
    layers: torch.Tensor | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """`window_scores` by the Triton kernels."""
    arena_layers, slots, num_kv_heads, head_dim = check_arena(arena)
    num_layers, num_queries, num_qo_heads, _ = queries.shape
    group = num_qo_heads // num_kv_heads
    prompt_len = len(prompt_slots)
    num_scored = prompt_len - shared_prefix_len - window_size
    assert queries.shape[3] == head_dim, queries.shape
    assert queries.is_contiguous() and prompt_slots.is_contiguous()
    assert arena.dtype in (queries.dtype, *FP8_DTYPES), (arena.dtype, queries.dtype)
    assert num_qo_heads == group * num_kv_heads, (num_qo_heads, num_kv_heads)
    assert 1 <= num_queries <= window_size, f"{num_queries} queries, a window of {window_size}"
    assert num_scored >= 1, f"{prompt_len} tokens, P={shared_prefix_len}, w={window_size}"
    assert prompt_slots.dtype == torch.int64, prompt_slots.dtype

    device = arena.device
    if layers is None:
        assert arena_layers == num_layers, (arena.shape, queries.shape)
        layers = torch.arange(num_layers, device=device)
    assert layers.shape == (num_layers,) and layers.dtype == torch.int64, layers
    data, e4m3_bits, factor = loadable(arena)
    if not isinstance(scaling, torch.Tensor):
        scaling = torch.full((num_layers,), scaling, device=device)
    assert scaling.shape == (num_layers,) and scaling.dtype == torch.float32, scaling
    scaling = scaling * (factor * LOG2E)
    query_weights = options.query_weights
    if query_weights is None:
        query_weights = torch.full((num_queries,), 1 / num_queries, device=device)
    assert query_weights.shape == (num_queries,) and query_weights.is_contiguous(), query_weights
    assert query_weights.dtype == torch.float32, query_weights.dtype
    arena_shape = {
        "slots": slots,
        "H": num_kv_heads,
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "E4M3_BITS": e4m3_bits,
    }
    prompt = _Prompt(queries, data, prompt_slots, layers, scaling, logit_cap * LOG2E, arena_shape)
    together = max(1, min(num_layers, SCRATCH_BYTES // (4 * num_qo_heads * num_scored)))
    attention = torch.empty(together, num_qo_heads, num_scored, device=device)
    scores = torch.empty(num_layers, num_kv_heads, num_scored, device=device)
    for first_layer in range(0, num_layers, together):
        count = min(together, num_layers - first_layer)
        sums = _log_sums(prompt, first_layer, count)
        _attend_scored(
            prompt, _weigh(sums, query_weights, options.root_mean_square), attention,
            first_layer, count, shared_prefix_len,
            root_mean_square=options.root_mean_square,
            token_norm=options.value_norm == "token",
        )  # fmt: skip
        # The number that a loaded value stands for is `factor` times itself.
        norms = torch.full(
            (count, num_kv_heads), factor if options.value_norm == "token" else 1.0, device=device
        )
        if options.value_norm == "head":
            scored_slots = prompt_slots[shared_prefix_len : prompt_len - window_size]
            norms = _value_norms(prompt, scored_slots, first_layer, count, factor)
        _pool[(triton.cdiv(num_scored, 1024), num_kv_heads, count)](
            attention,
            norms,
            scores[first_layer:],
            num_scored,
            POOL_WIDTH=options.pool_width,
            SPAN=options.span,
            SPAN_SHARE=options.span_share,
            MEAN=options.group_reduce == "mean",
            H=num_kv_heads,
            G=group,
            BLOCK_N=1024,
            num_warps=4,
        )
    return scores


class _Prompt(NamedTuple):
    """What all kernels read of a prompt."""

    queries: torch.Tensor
    data: torch.Tensor  # the arena, as `loadable` hands it over
    slots: torch.Tensor  # int64 [prompt_len]
    layers: torch.Tensor  # int64 [num_layers], the arena's layer of each of the queries'
    scaling: torch.Tensor  # float32 [num_layers], to the base-2 logarithm
    logit_cap: float  # to the base-2 logarithm
    arena_shape: dict[str, int]

    @property
    def group(self) -> int:
        return self.queries.shape[2] // self.arena_shape["H"]


def _log_sums(prompt: _Prompt, first_layer: int, count: int) -> torch.Tensor:
    """Base-2 log-sum-exp of every window query over the prompt, [count, H, group * queries]."""
    queries, num_kv_heads = prompt.queries, prompt.arena_shape["H"]
    num_queries, prompt_len = queries.shape[1], len(prompt.slots)
    rows = prompt.group * num_queries
    block_r, block_n, num_warps = _sums_blocks(rows, prompt.arena_shape["BLOCK_D"], queries.dtype)
    row_blocks = triton.cdiv(rows, block_r)
    splits = min(
        triton.cdiv(NUM_PROGRAMS, count * num_kv_heads * row_blocks),
        triton.cdiv(prompt_len, 4 * block_n),
    )
    partial = queries.new_empty(count, num_kv_heads, rows, splits, dtype=torch.float32)
    _softmax_sums[(row_blocks * splits, num_kv_heads, count)](
        queries,
        prompt.data,
        prompt.slots,
        prompt.layers,
        prompt.scaling,
        prompt.logit_cap,
        partial,
        prompt_len,
        num_queries,
        first_layer,
        splits,
        G=prompt.group,
        CAPPED=prompt.logit_cap > 0,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=2,
        **prompt.arena_shape,
    )
    if splits == 1:
        return partial[..., 0]
    top = partial.amax(dim=-1, keepdim=True)
    return ((partial - top).exp2().sum(dim=-1, keepdim=True).log2() + top)[..., 0]


def _weigh(sums: torch.Tensor, query_weights: torch.Tensor, root_mean_square: bool) -> torch.Tensor:
    """Log-sum-exps, [layers, H, group * queries], from which a query's probabilities, squared or
    not, come out times its weight."""
    shift = query_weights.log2() / (2 if root_mean_square else 1)
    return (sums.unflatten(-1, (-1, len(shift))) - shift).contiguous()


def _sums_blocks(rows: int, block_d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, tokens, warps) of a program. float32 has no tensor cores here: smaller tiles."""
    if dtype == torch.float32:
        return 16, 16, 4
    block_r = min(128 if block_d <= 128 else 64, max(16, triton.next_power_of_2(rows)))
    return block_r, 64, 8 if block_r == 128 else 4


def _attend_scored(
    prompt: _Prompt,
    sums: torch.Tensor,
    attention: torch.Tensor,
    first_layer: int,
    count: int,
    shared_prefix_len: int,
    *,
    root_mean_square: bool,
    token_norm: bool,
) -> None:
    """Write each query head's mean attention to the scored tokens into `attention`, times the
    token's value norm if `token_norm`."""
    queries, arena_shape = prompt.queries, prompt.arena_shape
    num_scored = attention.shape[2]
    block_w, block_n, num_warps = _mean_blocks(prompt)
    _mean_attention[(triton.cdiv(num_scored, block_n), arena_shape["H"], count)](
        queries,
        prompt.data,
        prompt.slots,
        prompt.layers,
        prompt.scaling,
        prompt.logit_cap,
        sums,
        attention,
        num_scored,
        queries.shape[1],
        first_layer,
        shared_prefix_len,
        G=prompt.group,
        CAPPED=prompt.logit_cap > 0,
        ROOT_MEAN_SQUARE=root_mean_square,
        TOKEN_NORM=token_norm,
        BLOCK_W=block_w,
        BLOCK_N=block_n,
        num_warps=num_warps,
        **arena_shape,
    )


def _mean_blocks(prompt: _Prompt) -> tuple[int, int, int]:
    """(queries, tokens, warps) of a program. More tokens read the queries less often; with more
    queries ptxas 13 spills for sm_100, and gfx942 needs 190 registers."""
    if prompt.queries.dtype == torch.float32:
        return 16, 32, 4
    wide = (16, 64, 8) if prompt.logit_cap else (32, 64, 4)
    return (16, 128, 8) if prompt.arena_shape["BLOCK_D"] <= 128 else wide


def _value_norms(
    prompt: _Prompt, scored_slots: torch.Tensor, first_layer: int, count: int, factor: float
) -> torch.Tensor:
    """float32 [count, H]: the largest L1 norm of a head's scored values."""
    blocks, num_kv_heads = triton.cdiv(len(scored_slots), 256), prompt.arena_shape["H"]
    norms = torch.empty(count, num_kv_heads, blocks, device=scored_slots.device)
    _value_norm[(blocks, num_kv_heads, count)](
        prompt.data,
        scored_slots,
        prompt.layers,
        norms,
        len(scored_slots),
        first_layer,
        BLOCKS_N=256 // 32,
        BLOCK_N=32,
        num_warps=4,
        num_stages=2,
        **prompt.arena_shape,
    )
    return norms.amax(dim=-1) * factor


@triton.jit
def _finite(numbers):
    """0 in the place of what is infinite or not a number."""
    return tl.where(tl.abs(numbers) < float("inf"), numbers, 0.0)


@triton.jit(do_not_specialize=["prompt_len", "num_queries", "first_layer", "splits", "slots"])
def _softmax_sums(
    queries_ptr,  # [L, num_queries, H * G, D]
    arena_ptr,
    prompt_slots_ptr,
    layers_ptr,  # [L], of the arena
    scaling_ptr,
    logit_cap,
    lse_ptr,  # [layers, H, G * num_queries, splits], base 2
    prompt_len,
    num_queries,
    first_layer,
    splits,
    slots,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    layer = first_layer + tl.program_id(2)
    split = (tl.program_id(0) % splits).to(tl.int64)
    # Row r: query head r // num_queries of the group, query r % num_queries of the window.
    row = (tl.program_id(0) // splits) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = num_queries * G
    query = row % num_queries
    q_row = (layer.to(tl.int64) * num_queries + query) * (H * G) + kv_head * G + row // num_queries
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        queries_ptr + q_row[:, None] * D + d[None, :],
        mask=(row < rows)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    scaling = tl.load(scaling_ptr + layer)
    arena_layer = tl.load(layers_ptr + layer)
    last_seen = prompt_len - num_queries + query

    blocks = tl.cdiv(prompt_len, BLOCK_N)
    begin = (split * blocks // splits).to(tl.int32) * BLOCK_N
    end = tl.minimum(((split + 1) * blocks // splits).to(tl.int32) * BLOCK_N, prompt_len)
    top = tl.full([BLOCK_R], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        live = token < prompt_len
        slot = tl.load(prompt_slots_ptr + token, mask=live, other=0)
        offset = entry_offset(arena_layer, slot, kv_head, slots, H, D)
        k = load_entries(arena_ptr, offset, live, D, BLOCK_D, E4M3_BITS, q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            logits = capped(logits, logit_cap)
        seen = (token[None, :] <= last_seen[:, None]) & live[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weight = weight * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    group_row = (tl.program_id(2).to(tl.int64) * H + kv_head) * rows + row
    tl.store(lse_ptr + group_row * splits + split, top + tl.log2(weight), mask=row < rows)


@triton.jit(
    do_not_specialize=["num_scored", "num_queries", "first_layer", "shared_prefix_len", "slots"]
)
def _mean_attention(
    queries_ptr,  # [L, num_queries, H * G, D]
    arena_ptr,
    prompt_slots_ptr,
    layers_ptr,  # [L], of the arena
    scaling_ptr,
    logit_cap,
    lse_ptr,  # [layers, H, G * num_queries], base 2, lower for queries that weigh more
    attention_ptr,  # [layers, H * G, num_scored]
    num_scored,
    num_queries,
    first_layer,
    shared_prefix_len,
    slots,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPPED: tl.constexpr,
    ROOT_MEAN_SQUARE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    layer = first_layer + tl.program_id(2)
    scored = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = scored < num_scored
    slot = tl.load(prompt_slots_ptr + shared_prefix_len + scored, mask=live, other=0)
    offset = entry_offset(tl.load(layers_ptr + layer), slot, kv_head, slots, H, D)
    dtype: tl.constexpr = queries_ptr.dtype.element_ty
    norm = tl.full([BLOCK_N], 1.0, tl.float32)
    if TOKEN_NORM:
        v_plane = slots.to(tl.int64) * (H * D)
        v = load_entries(arena_ptr, offset + v_plane, live, D, BLOCK_D, E4M3_BITS, tl.float32)
        norm = tl.sqrt(tl.sum(v * v, 1))
    k = load_entries(arena_ptr, offset, live, D, BLOCK_D, E4M3_BITS, dtype)
    scaling = tl.load(scaling_ptr + layer)
    d = tl.arange(0, BLOCK_D)
    group_head = (tl.program_id(2).to(tl.int64) * H + kv_head) * G
    for g in range(G):
        mean = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, num_queries, BLOCK_W):
            # Every scored token stands before the window: all queries see it.
            query = first + tl.arange(0, BLOCK_W)
            in_window = query < num_queries
            q_row = (layer.to(tl.int64) * num_queries + query) * (H * G) + kv_head * G + g
            q = tl.load(
                queries_ptr + q_row[:, None] * D + d[None, :],
                mask=in_window[:, None] & (d < D)[None, :],
                other=0.0,
            )
            lse = tl.load(
                lse_ptr + (group_head + g) * num_queries + query,
                mask=in_window,
                other=float("inf"),
            )
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scaling
            if CAPPED:
                logits = capped(logits, logit_cap)
            share = tl.exp2(logits - lse[None, :])
            if ROOT_MEAN_SQUARE:
                share = share * share
            mean += tl.sum(share, 1)
        if ROOT_MEAN_SQUARE:
            mean = tl.sqrt(mean)
        row_ptr = attention_ptr + (group_head + g) * num_scored
        tl.store(row_ptr + scored, _finite(mean * norm), mask=live)


@triton.jit(do_not_specialize=["num_scored", "first_layer", "slots"])
def _value_norm(
    arena_ptr,
    scored_slots_ptr,
    layers_ptr,  # [L], of the arena
    norms_ptr,  # [layers, H, blocks]
    num_scored,
    first_layer,
    slots,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    layer = tl.load(layers_ptr + first_layer + tl.program_id(2))
    v_plane = slots.to(tl.int64) * (H * D)
    norm = tl.zeros([BLOCK_N], tl.float32)
    for block in range(BLOCKS_N):
        scored = (tl.program_id(0) * BLOCKS_N + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = scored < num_scored
        slot = tl.load(scored_slots_ptr + scored, mask=live, other=0)
        offset = entry_offset(layer, slot, kv_head, slots, H, D) + v_plane
        v = load_entries(arena_ptr, offset, live, D, BLOCK_D, E4M3_BITS, tl.float32)
        norm = tl.maximum(norm, _finite(tl.sum(tl.abs(v), 1)))
    program = (tl.program_id(2).to(tl.int64) * H + kv_head) * tl.num_programs(0)
    tl.store(norms_ptr + program + tl.program_id(0), tl.max(norm, 0))


@triton.jit(do_not_specialize=["num_scored"])
def _pool(
    attention_ptr,  # [layers, H * G, num_scored]
    norms_ptr,  # [layers, H]
    scores_ptr,  # [layers, H, num_scored]
    num_scored,
    POOL_WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_SHARE: tl.constexpr,
    MEAN: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
    scored = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    score = tl.zeros([BLOCK_N], tl.float32)
    for g in range(G):
        row_ptr = attention_ptr + (head * G + g) * num_scored
        pooled = tl.zeros([BLOCK_N], tl.float32)  # attention is not negative
        for shift in range(POOL_WIDTH):
            at = scored + (shift - POOL_WIDTH // 2)
            mask = (at >= 0) & (at < num_scored)
            pooled = tl.maximum(pooled, tl.load(row_ptr + at, mask=mask, other=0.0))
        for distance in range(1, SPAN + 1):
            at = scored - distance
            before = tl.load(row_ptr + at, mask=(at >= 0) & (at < num_scored), other=0.0)
            pooled = tl.maximum(pooled, SPAN_SHARE * before)
        score = score + pooled / G if MEAN else tl.maximum(score, pooled)
    norm = tl.load(norms_ptr + head)
    row_ptr = scores_ptr + head * num_scored
    tl.store(row_ptr + scored, _finite(score * norm), mask=scored < num_scored)
