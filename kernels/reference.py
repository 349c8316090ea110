# SPDX-License-Identifier: Apache-2.0
"""Every op in plain torch: what the fused kernels are tested against, and runs on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def window_attention_ref(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Mean causal attention that the last W tokens pay to each token of the prompt.

    queries: [W, num_qo_heads, head_dim], after RoPE, of the last W tokens.
    keys: [prompt_len, num_kv_heads, head_dim], after RoPE.
    scaling: factor on the logits, 1/sqrt(head_dim) in most models.
    Returns float32 [num_qo_heads, prompt_len]. Softmax in float32 over the whole prompt.
    Source: SnapKV, arXiv 2404.14469, eq. 1-2, with the mean in place of the sum.
    """
    num_queries, num_qo_heads, head_dim = queries.shape
    prompt_len, num_kv_heads, _ = keys.shape
    group = num_qo_heads // num_kv_heads
    # [num_kv_heads, group * W, head_dim]
    q = queries.float().transpose(0, 1).reshape(num_kv_heads, group * num_queries, head_dim)
    k = keys.float().permute(1, 2, 0)  # [num_kv_heads, head_dim, prompt_len]
    logits = torch.matmul(q * scaling, k).view(num_qo_heads, num_queries, prompt_len)
    # Query t stands at prompt_len - W + t and sees the tokens up to itself.
    hidden = torch.ones(num_queries, num_queries, dtype=torch.bool, device=q.device).triu(1)
    logits[:, :, prompt_len - num_queries :].masked_fill_(hidden, float("-inf"))
    return logits.softmax(dim=-1).mean(dim=1)


def max_pool_ref(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Running maximum over `width` neighbours of each token, ends clipped.

    scores: [rows, tokens]. width: odd. Returns the same shape and dtype.
    """
    return F.max_pool1d(scores[None], width, stride=1, padding=width // 2)[0]


def top_entries_ref(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best tokens of each row, ties to the lower token, in ascending order.

    scores: [..., tokens] float. Returns int64 [..., count].
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def copy_entries_ref(
    buffers: list[torch.Tensor], src_slots: torch.Tensor, dst_slots: torch.Tensor
) -> None:
    """Copy each head's kept entries into fresh slots, all layers. Mutates `buffers`.

    buffers: K or V of every layer, [slots, num_kv_heads, head_dim].
    src_slots: int64 [num_layers, num_kv_heads, kept], the slot of each kept entry.
    dst_slots: int64 [kept], disjoint from src_slots; column j of every head goes to dst_slots[j].
    """
    num_kv_heads = src_slots.shape[1]
    heads = torch.arange(num_kv_heads, device=src_slots.device)
    for buffer, src in zip(buffers, src_slots.unbind(0), strict=True):
        buffer[dst_slots] = buffer[src.T, heads]  # [kept, num_kv_heads, head_dim]
