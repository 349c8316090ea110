# SPDX-License-Identifier: Apache-2.0
"""Decode attention on a CPU over the tape: reads each K and V row once, on torch's thread count.

Bound by memory: 2 * D * itemsize bytes and 4 * group * D flops an entry. The threads sleep between
calls and are not OpenMP's, so they never spin against torch's own pool.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.cpu import ragged_decode_jit as jit

CHUNKS_PER_THREAD = 4  # so that a thread that was interrupted does not hold up the others
MAX_GROUP = 16
# torch storage -> the integers that the compiled code reads it as
STORAGE = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float32: torch.float32,
    torch.float8_e4m3fn: torch.uint8,
}


def ragged_decode_cpu(
    q: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: BatchTables,
    scaling: float,
    out: torch.Tensor,
    *,
    sliding_window: int = 0,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attention of one new token per request over its prefix, tape pieces and tail.

    q: [batch, num_qo_heads, head_dim], any float dtype. head_dim is a multiple of 8, num_qo_heads
        one to sixteen times num_kv_heads.
    arena: [num_layers, 2, slots, num_kv_heads, head_dim] bf16, fp16, fp32 or e4m3fn, contiguous;
        K first.
    layer: index into the arena.
    tables: where each request's entries are.
    scaling: factor on the logits. sliding_window, logit_cap: as of `ragged_decode.ragged_decode`.
    k_scale, v_scale: what the entries were divided by (fp8).
    out: [batch, num_qo_heads, head_dim], mutated and returned. Zeros where seq_lens is 0.

    float32 inside. Bitwise the same for any number of threads. Raises ValueError on a shape or
    dtype that it cannot read; slots and lengths are not checked. The first call for a head shape
    compiles (see `compile_ragged_decode`).
    """
    req_to_token, req_pool_indices, seq_lens, prefix_lens, budgets, offsets = tables
    batch, num_qo_heads, head_dim = q.shape
    _, _, num_slots, num_kv_heads, _ = arena.shape
    _check(q, arena, req_to_token, offsets)
    group = num_qo_heads // num_kv_heads
    order = _element_order(head_dim, arena.dtype)
    requests = req_pool_indices.long().numpy()
    rows, prefixes, budget_table = req_to_token.numpy(), prefix_lens.numpy(), budgets.numpy()
    num_threads = torch.get_num_threads()
    items, first_of_request, first_of_chunk, query, maxima, sums, outputs = jit.prepare(
        q.float().reshape(batch, -1).contiguous().numpy(),
        np.float32(scaling * k_scale * math.log2(math.e)),
        order,
        layer,
        num_kv_heads,
        sliding_window,
        requests,
        seq_lens.long().numpy(),
        prefixes,
        budget_table,
        offsets.numpy(),
        1 if num_threads == 1 else CHUNKS_PER_THREAD * num_threads,
    )
    attend = jit.attend_kernel(head_dim, group)
    storage = arena.view(-1).view(STORAGE[arena.dtype]).numpy()
    base_2_cap = np.float32(logit_cap * math.log2(math.e))
    chunks = itertools.count()
    num_chunks = len(first_of_chunk) - 1

    def attend_to_chunks() -> None:
        while (chunk := next(chunks)) < num_chunks:
            attend(
                first_of_chunk[chunk], first_of_chunk[chunk + 1], items, query, storage, layer,
                num_kv_heads, num_slots, rows, requests, prefixes, budget_table, base_2_cap, maxima,
                sums, outputs,
            )  # fmt: skip

    helpers = [
        _pool(num_threads).submit(attend_to_chunks) for _ in range(min(num_threads, num_chunks) - 1)
    ]
    attend_to_chunks()
    for helper in helpers:
        if not helper.cancel():  # one that has not started has nothing left to do
            helper.result()
    merged = np.empty((batch, num_qo_heads * head_dim), np.float32)
    jit.merge(items, first_of_request, num_kv_heads, group, order, maxima, sums, outputs, merged)
    return out.copy_(torch.from_numpy(merged).mul_(v_scale).view(q.shape))


def compile_ragged_decode(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Compiles the op for one model, or loads it from numba's cache: call it at start-up.

    Seconds the first time on a machine, tenths of a second after that.
    """
    arena = torch.zeros(1, 2, 2, num_kv_heads, head_dim, dtype=dtype)
    table = torch.zeros(1, dtype=torch.int32)
    q = torch.zeros(1, num_qo_heads, head_dim)
    ragged_decode_cpu(
        q,
        arena,
        layer=0,
        tables=BatchTables(
            req_to_token=torch.zeros(1, 1, dtype=torch.int32),
            req_pool_indices=torch.zeros(1, dtype=torch.int64),
            seq_lens=torch.ones(1, dtype=torch.int64),
            prefix_lens=table,
            budgets=table,
            offsets=torch.zeros(1, num_kv_heads + 1, dtype=torch.int32),
        ),
        scaling=1.0,
        out=torch.empty_like(q),
    )


def _check(
    q: torch.Tensor, arena: torch.Tensor, req_to_token: torch.Tensor, offsets: torch.Tensor
) -> None:
    _, num_qo_heads, head_dim = q.shape
    num_layers, _, _, num_kv_heads, _ = arena.shape
    if arena.dtype not in STORAGE:
        raise ValueError(f"arena.dtype {arena.dtype}: accepted are {[*STORAGE]}")
    if arena.dtype == torch.float16 and not jit.converts_float16():
        raise ValueError(
            "arena.dtype torch.float16: this CPU has no F16C, accepted are torch.bfloat16 and "
            "torch.float32"
        )
    if not (arena.is_contiguous() and arena.shape[1] == 2 and arena.shape[4] == head_dim):
        raise ValueError(
            f"arena {tuple(arena.shape)}: accepted is a contiguous [layers, 2, slots, heads, "
            f"{head_dim}]"
        )
    if head_dim % 8:
        raise ValueError(f"head_dim {head_dim}: accepted are multiples of 8")
    group, rest = divmod(num_qo_heads, num_kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise ValueError(
            f"num_qo_heads {num_qo_heads}: accepted are 1 to {MAX_GROUP} times num_kv_heads "
            f"{num_kv_heads}"
        )
    if req_to_token.dtype != torch.int32:
        raise ValueError(f"req_to_token.dtype {req_to_token.dtype}: accepted is torch.int32")
    if offsets.shape[1] != num_layers * num_kv_heads + 1:
        raise ValueError(
            f"offsets.shape {tuple(offsets.shape)}: accepted is [rows, "
            f"{num_layers * num_kv_heads + 1}]"
        )


@functools.cache
def _element_order(head_dim: int, dtype: torch.dtype) -> np.ndarray:
    return jit.element_order(head_dim, dtype == torch.bfloat16)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads - 1, thread_name_prefix="lava-decode")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the threads
