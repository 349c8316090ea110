# SPDX-License-Identifier: Apache-2.0
"""How many of a request's scored entries each layer keeps: weights, and their exact division."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import triton
import triton.language as tl

from lava_sglang.kernels.reference import layer_entropy_ref

WEIGHT_UNIT = 2.0**-30  # weights are read as whole multiples of it
ENTROPY_BLOCK = 4096
MAX_CAP = 2**30
"""Scored entries of a layer: 33 million tokens of 32 heads. Products of a cap, a share of at most
2**30 and 2 then stay below 2**62."""


def layer_entropy(scores: torch.Tensor) -> torch.Tensor:
    """How evenly each layer's scores are spread: 0 for one entry, 1 for all equal.

    scores: float32 [num_layers, num_kv_heads, tokens], contiguous, non-negative.
    Returns float32 [num_layers]: -sum(p ln p) / ln(num_kv_heads * tokens), p the shares of the
    layer's sum; 0 where that sum is 0 or there is one entry. Source: LAVa, arXiv 2509.09754.
    """
    return layer_entropy_triton(scores) if scores.is_cuda else layer_entropy_ref(scores)


def layer_entropy_triton(scores: torch.Tensor) -> torch.Tensor:
    """`layer_entropy` by the Triton kernel: the shares are never written."""
    assert scores.dtype == torch.float32 and scores.is_contiguous(), scores.dtype
    flat = scores.flatten(1)
    num_layers, count = flat.shape
    blocks = triton.cdiv(count, ENTROPY_BLOCK)
    partial = torch.empty(num_layers, blocks, device=scores.device)
    _entropy[(blocks, num_layers)](
        flat, flat.sum(dim=1), partial, count, BLOCK=ENTROPY_BLOCK, num_warps=8
    )
    return partial.sum(dim=1) / math.log(max(count, 2))


def uniform_weights(num_layers: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The same share for every layer. float32 [num_layers]."""
    return torch.ones(num_layers, device=device)


def pyramid_weights(
    num_layers: int, device: torch.device | str = "cpu", beta: float = 20.0
) -> torch.Tensor:
    """Shares that fall linearly from the first layer to the last, which gets mean / beta.

    Returns float32 [num_layers] in (0, 1]. Source: PyramidKV, arXiv 2406.02069.
    """
    last = 1.0 / (2.0 * beta - 1.0)  # of the first layer's share
    if num_layers == 1:
        return torch.ones(1, device=device)
    step = (1.0 - last) / (num_layers - 1)
    return 1.0 - step * torch.arange(num_layers, dtype=torch.float32, device=device)


def layer_split(weights: torch.Tensor, total: int, cap: int) -> torch.Tensor:
    """Divide `total` scored entries over the layers, in proportion to their weights.

    Webster's divisor method: each entry goes to the layer with the largest
    weight / (2 * entries + 1), ties to the lower layer; a layer that holds `cap` gets no more. The
    sum is exact, and a smaller total never gives a layer more.
    weights: float32 [num_layers] in [0, 1], read to 2**-30; less, and not finite, counts as 2**-30.
    cap: num_kv_heads * tokens, at most 2**30; total: at most num_layers * cap.
    Returns int64 [num_layers] on the weights' device, from where nothing is read back.
    """
    run = layer_split_triton if weights.is_cuda else _on_cpu
    return run(weights, total, cap)


def layer_split_triton(weights: torch.Tensor, total: int, cap: int) -> torch.Tensor:
    """`layer_split` by the Triton kernel."""
    shares = _shares(weights, total, cap)
    num_layers = len(shares)
    counts = torch.empty_like(shares)
    _divide[(1,)](
        shares,
        counts,
        total,
        cap,
        L=num_layers,
        BLOCK_L=triton.next_power_of_2(num_layers),
        num_warps=1,  # a reduction is then a few shuffles
    )
    return counts


def _on_cpu(weights: torch.Tensor, total: int, cap: int) -> torch.Tensor:
    """`layer_split` in whole numbers of Python: a few dozen layers, a few dozen steps."""
    shares = _shares(weights, total, cap).tolist()
    largest = max(shares)

    def counts(divisor: int) -> list[int]:
        return [min(cap, (2 * share * divisor + largest) // (2 * largest)) for share in shares]

    low, high = 0, cap * largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle - 1)
    held = counts(low)
    rest = total - sum(held)
    # One divisor more and each layer is due at most one entry more: the largest next quotients.
    waiting = [layer for layer in range(len(shares)) if held[layer] < cap]
    waiting.sort(key=lambda layer: -Fraction(shares[layer], 2 * held[layer] + 1))
    for layer in waiting[:rest]:
        held[layer] += 1
    return torch.tensor(held)


def _shares(weights: torch.Tensor, total: int, cap: int) -> torch.Tensor:
    """Weights in units of WEIGHT_UNIT, int64 in [1, 2**30]."""
    num_layers = len(weights)
    assert weights.dtype == torch.float32 and weights.dim() == 1, (weights.dtype, weights.shape)
    assert 1 <= cap <= MAX_CAP, f"cap={cap}: from 1 to 2**30"
    assert 0 <= total <= num_layers * cap, f"total={total}: at most {num_layers} layers of {cap}"
    units = torch.nan_to_num(weights, nan=0.0, posinf=0.0).double() / WEIGHT_UNIT
    return units.round().clamp(1, 2**30).long()


@triton.jit(do_not_specialize=["count"])
def _entropy(
    scores_ptr,  # [L, count]
    sums_ptr,  # [L]
    partial_ptr,  # [L, blocks]
    count,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums_ptr + layer)
    score = tl.load(scores_ptr + layer * count + i, mask=i < count, other=0.0)
    share = score / tl.where(total > 0, total, 1.0)
    terms = tl.where(share > 0, -share * tl.log(tl.where(share > 0, share, 1.0)), 0.0)
    tl.store(partial_ptr + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(terms, 0))


@triton.jit
def _rounded(shares, divisor, largest, cap):
    """Entries of each layer when the layer of the largest share is due `divisor` of them.

    min(cap, share * divisor / largest rounded half up); the product is formed below the cap only.
    """
    # The smallest divisor at which a layer is full.
    full_at = tl.cdiv((2 * cap - 1) * largest, 2 * shares)
    below = tl.minimum(divisor, full_at)
    return tl.where(divisor >= full_at, cap, (2 * shares * below + largest) // (2 * largest))


@triton.jit(do_not_specialize=["total", "cap"])
def _divide(shares_ptr, counts_ptr, total, cap, L: tl.constexpr, BLOCK_L: tl.constexpr):
    layer = tl.arange(0, BLOCK_L)
    valid = layer < L
    shares = tl.load(shares_ptr + layer, mask=valid, other=1)
    largest = tl.max(tl.where(valid, shares, 0), 0)
    cap = cap.to(tl.int64)
    total = total.to(tl.int64)

    # The largest divisor whose rounded shares fit in the total.
    low = cap * 0
    high = cap * largest
    while low < high:
        middle = (low + high + 1) // 2
        taken = tl.sum(tl.where(valid, _rounded(shares, middle, largest, cap), 0), 0)
        fits = taken <= total
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    held = _rounded(shares, low, largest, cap)
    rest = total - tl.sum(tl.where(valid, held, 0), 0)

    # One divisor more and each layer is due at most one entry more: the rest go to the largest
    # next quotients, share / (2 * held + 1), compared by cross-multiplication.
    waits = valid & (held < cap)
    odd = 2 * held + 1
    rank = tl.zeros([BLOCK_L], tl.int32)
    for other in range(L):
        other_share = tl.sum(tl.where(layer == other, shares, 0), 0)
        other_odd = tl.sum(tl.where(layer == other, odd, 0), 0)
        mine, theirs = shares * other_odd, other_share * odd
        ahead = (theirs > mine) | ((theirs == mine) & (other < layer))
        rank += (ahead & (other_odd < 2 * cap + 1)).to(tl.int32)
    counts = held + (waits & (rank < rest)).to(tl.int64)
    tl.store(counts_ptr + layer, counts, mask=valid)
