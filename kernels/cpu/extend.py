# SPDX-License-Identifier: Apache-2.0
"""Extend attention on a CPU that attends to a cached prefix and does not recompute it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Causal attention of each request's new tokens over its prefix and themselves.

    q: [tokens, num_qo_heads, head_dim], the new tokens, request after request.
    k_cache, v_cache: [slots, num_kv_heads, head_dim] of one layer, the new tokens' rows included.
    req_to_token: int32 [rows, max_context]; req_pool_indices: int [batch], rows of it.
    seq_lens, extend_prefix_lens, extend_seq_lens: int [batch], seq = prefix + extend.
    scaling: factor on the logits. k_scale, v_scale: what the cached rows were divided by (fp8).
    out: [tokens, num_qo_heads, head_dim], mutated and returned.

    SGLang's torch_native computes seq_len x seq_len attention for every chunk; this computes
    extend x seq_len, as two parts that are merged by their log-sum-exp. Raises ValueError where
    the lengths do not add up.
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
            out[start:end] = _extend_one(
                q[start:end],
                k_cache[slots].to(q.dtype).transpose(0, 1),
                v_cache[slots].to(q.dtype).transpose(0, 1),
                prefix_len,
                scaling * k_scale,
            ).mul_(v_scale)
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


def _host(lengths: torch.Tensor | Sequence[int]) -> list[int]:
    return lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
