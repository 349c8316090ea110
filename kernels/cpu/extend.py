# SPDX-License-Identifier: Apache-2.0
"""Extend attention on a CPU that attends to a cached prefix and does not recompute it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lava_sglang.kernels.reference import capped_ref

BLOCK_QUERIES = 256  # whose logits are in memory at a time

# Plain SDPA does not return the log-sum-exp that a merge needs.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def extend_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor | Sequence[int],
    extend_prefix_lens: torch.Tensor | Sequence[int],
    extend_seq_lens: torch.Tensor | Sequence[int],
    scaling: float,
    out: torch.Tensor,
    *,
    sliding_window: int = 0,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Causal attention of each request's new tokens over its prefix and themselves.

    q: [tokens, num_qo_heads, head_dim], the new tokens, request after request.
    k_cache, v_cache: [slots, num_kv_heads, head_dim] of one layer, the new tokens' rows included.
    req_to_token: int32 [rows, max_context]; req_pool_indices: int [batch], rows of it.
    seq_lens, extend_prefix_lens, extend_seq_lens: int [batch], seq = prefix + extend.
    scaling: factor on the logits. sliding_window: tokens that each attends to, itself and the last
    ones before it; 0: all. logit_cap: as of `reference.capped_ref`. k_scale, v_scale: what the
    cached rows were divided by (fp8).
    out: [tokens, num_qo_heads, head_dim], mutated and returned.

    SGLang's torch_native computes seq_len x seq_len attention for every chunk; this computes
    extend x seq_len, as two parts that are merged by their log-sum-exp; or, of a layer with a
    window or a cap, block by block over what is in reach. Raises ValueError where the lengths do
    not add up.
    """
    lengths = zip(
        _host(req_pool_indices),
        _host(seq_lens),
        _host(extend_prefix_lens),
        _host(extend_seq_lens),
        strict=True,
    )
    start = 0
    for row, seq_len, prefix_len, extend_len in lengths:
        if prefix_len + extend_len != seq_len:
            raise ValueError(
                f"seq_lens {seq_len}: accepted is extend_prefix_lens + extend_seq_lens, "
                f"{prefix_len} + {extend_len}"
            )
        end = start + extend_len
        if extend_len > 0:
            slots = req_to_token[row, :seq_len]
            k, v = (cache[slots].to(q.dtype).transpose(0, 1) for cache in (k_cache, v_cache))
            if sliding_window or logit_cap:
                one = _extend_in_blocks(
                    q[start:end], k, v, scaling * k_scale, sliding_window or seq_len, logit_cap
                )
            else:
                one = _extend_one(q[start:end], k, v, prefix_len, scaling * k_scale)
            out[start:end] = one.mul_(v_scale)
        start = end
    if start != q.shape[0]:
        raise ValueError(f"extend_seq_lens sum to {start}: accepted is q.shape[0], {q.shape[0]}")
    return out


def _extend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_len: int, scaling: float
) -> torch.Tensor:
    """q: [tokens, num_qo_heads, head_dim]; k, v: [num_kv_heads, seq_len, head_dim]. Like q."""
    num_tokens, _, head_dim = q.shape
    num_kv_heads = k.shape[0]
    grouped = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    group = grouped.shape[1]
    # [num_kv_heads, group, tokens, head_dim]: a group shares its head's rows by a stride of 0.
    shared = (num_kv_heads, group, num_tokens, head_dim)
    output, lse = _attention(
        grouped,
        k[:, None, prefix_len:].expand(shared),
        v[:, None, prefix_len:].expand(shared),
        is_causal=True,
        scale=scaling,
    )
    if prefix_len > 0:
        # No mask here, so the group's queries are just more queries of the same head.
        prefix_output, prefix_lse = _attention(
            grouped.reshape(1, num_kv_heads, group * num_tokens, head_dim),
            k[None, :, :prefix_len],
            v[None, :, :prefix_len],
            scale=scaling,
        )
        weight = torch.sigmoid(prefix_lse.view(lse.shape) - lse)[..., None]
        output = torch.lerp(output.float(), prefix_output.view(shared).float(), weight.float())
    return output.permute(2, 0, 1, 3).reshape(q.shape).to(q.dtype)


def _extend_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    sliding_window: int,
    logit_cap: float,
) -> torch.Tensor:
    """q: [tokens, num_qo_heads, head_dim], the last of the keys' tokens; k, v: [num_kv_heads,
    seq_len, head_dim]. A query attends to the last `sliding_window` tokens up to its own. Like q.
    """
    num_kv_heads, seq_len, head_dim = k.shape
    out = torch.empty_like(q)
    for begin in range(0, len(q), BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, len(q))
        last = torch.arange(begin, end) + seq_len - len(q)  # the query's own place
        seen = slice(max(0, int(last[0]) - sliding_window + 1), int(last[-1]) + 1)
        place = torch.arange(seen.start, seen.stop)
        hidden = (place > last[:, None]) | (place <= last[:, None] - sliding_window)
        # [num_kv_heads, group * queries, head_dim]
        grouped = q[begin:end].view(end - begin, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        rows = grouped.reshape(num_kv_heads, -1, head_dim).float() * scaling
        logits = capped_ref(rows @ k[:, seen].float().mT, logit_cap)
        logits.unflatten(1, (-1, end - begin)).masked_fill_(hidden, float("-inf"))
        block = logits.softmax(dim=2) @ v[:, seen].float()
        block = block.view(num_kv_heads, -1, end - begin, head_dim).permute(2, 0, 1, 3)
        out[begin:end] = block.reshape(end - begin, -1, head_dim)
    return out


def _host(lengths: torch.Tensor | Sequence[int]) -> list[int]:
    return lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
