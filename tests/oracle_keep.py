# SPDX-License-Identifier: Apache-2.0
"""Owns what each method keeps of an oracle's prefill, as a mask; shares no code with the plugin."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tests.oracle import Prefill


def snapkv_keep(
    prefill: Prefill, prefix_len: int, budget: int, window_size: int, pool_width: int = 7
) -> Tensor:
    """SnapKV's choice of entries, bool [L, H, I]: `prefix_len + budget` in every head.

    A suffix token's score is its window attention, max-pooled over `pool_width` neighbours in the
    scored range [prefix_len, I - window_size), then averaged over the query heads of a KV head.
    The prefix and the window are always kept; ties go to the lower index.
    Source: SnapKV, arXiv 2404.14469.
    """
    layers, heads, prompt_len = prefill.value_l1.shape
    _check_budget(prompt_len, prefix_len, budget, window_size)
    if pool_width < 1 or pool_width % 2 == 0:
        raise ValueError(f"pool_width is {pool_width}, must be odd and at least 1")
    if prefill.window_start != prompt_len - window_size:
        raise ValueError(
            f"window_size is {window_size}, must be {prompt_len - prefill.window_start}, "
            "the window that the prefill recorded"
        )
    group = prefill.window_attention.shape[1] // heads
    window_start = prompt_len - window_size
    keep = torch.zeros(layers, heads, prompt_len, dtype=torch.bool)
    keep[:, :, :prefix_len] = True
    keep[:, :, window_start:] = True
    if budget == window_size:
        return keep
    for layer in range(layers):
        for head in range(heads):
            total = torch.zeros(window_start - prefix_len)
            for query_head in range(head * group, (head + 1) * group):
                attention = prefill.window_attention[layer, query_head, prefix_len:window_start]
                total = total + torch.nn.functional.max_pool1d(
                    attention[None], pool_width, stride=1, padding=pool_width // 2
                ).squeeze(0)
            order = torch.sort(total / group, descending=True, stable=True).indices
            keep[layer, head, prefix_len + order[: budget - window_size]] = True
    return keep


def lava_keep(
    prefill: Prefill, prefix_len: int, budget: int, window_size: int, pool_width: int = 7
) -> Tensor:
    """LAVa's choice, bool [L, H, I]: L * H * budget entries of the suffix in all.

    A suffix token's score is its window attention, max-pooled, the largest over the query heads of
    a KV head, times the largest L1 norm of the head's scored values. A layer's share of the
    scored entries is the normalised entropy of its scores; its best entries are kept, whichever
    head they are in. Source: LAVa, arXiv 2509.09754.
    """
    layers, heads, prompt_len = prefill.value_l1.shape
    _check_budget(prompt_len, prefix_len, budget, window_size)
    scored = slice(prefix_len, prompt_len - window_size)
    scores, entropies = [], []
    for layer in range(layers):
        pooled = _pooled_attention(prefill, layer, scored, pool_width)  # [H, G, scored]
        norms = prefill.value_l1[layer, :, scored].max(dim=1).values
        score = pooled.max(dim=1).values * norms[:, None]
        share = (score / score.sum()).flatten()
        entropy = -(share * share.clamp(min=1e-45).log()).sum() / math.log(share.numel())
        scores.append(score)
        entropies.append(float(entropy))
    total = layers * heads * (budget - window_size)
    counts = _divide(entropies, total, scores[0].numel())
    return _keep_best(scores, counts, prefix_len, prompt_len, [0] * layers)


def lava_span_keep(prefill: Prefill, prefix_len: int, budget: int, window_size: int) -> Tensor:
    """LAVaSpan's choice, bool [L, H, I]: the best of each layer across its heads, a fifth of the
    mean for every head first.

    What an entry adds to the output of a query head: the root mean square of its window attention
    times the L2 norm of its value. A token scores that, or 0.3 of the most that one of the 16
    scored tokens before it adds if that is more; the mean over the query heads of a KV head.
    """
    layers, heads, prompt_len = prefill.value_l1.shape
    _check_budget(prompt_len, prefix_len, budget, window_size)
    scored = slice(prefix_len, prompt_len - window_size)
    scores = []
    for layer in range(layers):
        sizes = prefill.values[layer, :, scored].square().sum(dim=2).sqrt()  # [H, scored]
        attention = prefill.window_rms[layer, :, scored].unflatten(0, (heads, -1))
        added = attention * sizes[:, None]  # [H, G, scored]
        lifted = added.clone()
        for distance in range(1, min(16, scored.stop - scored.start - 1) + 1):
            lifted[:, :, distance:] = lifted[:, :, distance:].maximum(0.3 * added[..., :-distance])
        scores.append(lifted.mean(dim=1))
    count = heads * (budget - window_size)
    floor = int(0.2 * (budget - window_size))
    return _keep_best(scores, [count] * layers, prefix_len, prompt_len, [floor] * layers)


def adakv_keep(
    prefill: Prefill, prefix_len: int, budget: int, window_size: int, pool_width: int = 7
) -> Tensor:
    """AdaKV's choice, bool [L, H, I]: SnapKV's scores, the best of each layer across its heads, and
    a fifth of the mean for every head. Source: AdaKV, arXiv 2407.11550."""
    layers, heads, prompt_len = prefill.value_l1.shape
    _check_budget(prompt_len, prefix_len, budget, window_size)
    scored = slice(prefix_len, prompt_len - window_size)
    scores = [
        _pooled_attention(prefill, layer, scored, pool_width).mean(dim=1) for layer in range(layers)
    ]
    count = heads * (budget - window_size)
    floor = int(0.2 * (budget - window_size))
    return _keep_best(scores, [count] * layers, prefix_len, prompt_len, [floor] * layers)


def pyramidkv_keep(
    prefill: Prefill, prefix_len: int, budget: int, window_size: int, pool_width: int = 7
) -> Tensor:
    """PyramidKV's choice, bool [L, H, I]: SnapKV's scores, heads alike, a layer's share falling
    linearly to a twentieth of the mean in the last. Source: PyramidKV, arXiv 2406.02069."""
    layers, heads, prompt_len = prefill.value_l1.shape
    _check_budget(prompt_len, prefix_len, budget, window_size)
    scored = slice(prefix_len, prompt_len - window_size)
    last, mean = 1 / 20, 1.0
    first = 2 * mean - last
    shares = [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
    most = scored.stop - scored.start
    counts = _divide([share / first for share in shares], layers * (budget - window_size), most)
    keep = torch.zeros(layers, heads, prompt_len, dtype=torch.bool)
    for layer in range(layers):
        score = _pooled_attention(prefill, layer, scored, pool_width).mean(dim=1)
        for head in range(heads):
            order = torch.sort(score[head], descending=True, stable=True).indices
            keep[layer, head, prefix_len + order[: counts[layer]]] = True
    keep[:, :, :prefix_len] = True
    keep[:, :, scored.stop :] = True
    return keep


class _Keep(Protocol):
    def __call__(
        self, prefill: Prefill, prefix_len: int, budget: int, window_size: int
    ) -> Tensor: ...


def per_rank_keep(
    keep: _Keep, prefill: Prefill, tp_size: int, prefix_len: int, budget: int, window_size: int
) -> Tensor:
    """A choice under tensor parallelism, bool [L, H, I]: each of `tp_size` ranks holds H / tp_size
    KV heads and keeps L * H / tp_size * budget of their entries."""
    heads = prefill.value_l1.shape[1]
    if heads % tp_size:
        raise ValueError(f"tp_size is {tp_size}, must divide {heads} KV heads")
    parts = zip(
        prefill.keys.chunk(tp_size, dim=1),
        prefill.values.chunk(tp_size, dim=1),
        prefill.window_queries.chunk(tp_size, dim=1),
        prefill.window_attention.chunk(tp_size, dim=1),
        prefill.window_rms.chunk(tp_size, dim=1),
        prefill.value_l1.chunk(tp_size, dim=1),
        strict=True,
    )
    kept = []
    for keys, values, queries, attention, rms, value_l1 in parts:
        of_rank = replace(
            prefill,
            keys=keys,
            values=values,
            window_queries=queries,
            window_attention=attention,
            window_rms=rms,
            value_l1=value_l1,
        )
        kept.append(keep(of_rank, prefix_len, budget, window_size))
    return torch.cat(kept, dim=1)


def _pooled_attention(prefill: Prefill, layer: int, scored: slice, pool_width: int) -> Tensor:
    """Max-pooled window attention of the scored tokens, [H, G, tokens]."""
    heads = prefill.value_l1.shape[1]
    pooled = torch.nn.functional.max_pool1d(
        prefill.window_attention[layer, :, scored],
        pool_width,
        stride=1,
        padding=pool_width // 2,
    )
    return pooled.view(heads, -1, pooled.shape[-1])


def _divide(weights: Sequence[float], total: int, most: int) -> list[int]:
    """`total` seats by Webster's method, one at a time, ties to the lower index, `most` each."""
    seats = [0] * len(weights)
    queue = [(-weight, index) for index, weight in enumerate(weights)]
    heapq.heapify(queue)
    for _ in range(total):
        _, index = heapq.heappop(queue)
        seats[index] += 1
        if seats[index] < most:
            heapq.heappush(queue, (-weights[index] / (2 * seats[index] + 1), index))
    return seats


def _keep_best(
    scores: Sequence[Tensor],
    counts: Sequence[int],
    prefix_len: int,
    prompt_len: int,
    floors: Sequence[int],
) -> Tensor:
    """Each layer's best entries across its heads, its floor in every head first; bool [L, H, I]."""
    heads, scored_len = scores[0].shape
    keep = torch.zeros(len(scores), heads, prompt_len, dtype=torch.bool)
    for layer, (score, count, floor) in enumerate(zip(scores, counts, floors, strict=True)):
        chosen = torch.zeros(heads, scored_len, dtype=torch.bool)
        for head in range(heads):
            order = torch.sort(score[head], descending=True, stable=True).indices
            chosen[head, order[:floor]] = True
        rest = count - heads * floor
        for index in torch.sort(score.flatten(), descending=True, stable=True).indices.tolist():
            if rest == 0:
                break
            if not chosen.view(-1)[index]:
                chosen.view(-1)[index] = True
                rest -= 1
        keep[layer, :, prefix_len : prefix_len + scored_len] = chosen
    keep[:, :, :prefix_len] = True
    keep[:, :, prefix_len + scored_len :] = True
    return keep


def streamingllm_keep(
    prefill: Prefill, prefix_len: int, budget: int, window_size: int, sinks: int = 4
) -> Tensor:
    """StreamingLLM's choice, bool [L, H, I]: the prefix, the first `sinks` tokens of the suffix and
    the last `budget - sinks` of the prompt. Source: arXiv 2309.17453."""
    prompt_len = len(prefill.input_ids)
    _check_budget(prompt_len, prefix_len, budget, window_size)
    if not 0 <= sinks <= budget - window_size:
        raise ValueError(f"sinks is {sinks}, must be in [0, {budget - window_size}]")
    keep = torch.zeros(prefill.value_l1.shape, dtype=torch.bool)
    keep[:, :, : prefix_len + sinks] = True
    keep[:, :, prompt_len - (budget - sinks) :] = True
    return keep


def _check_budget(prompt_len: int, prefix_len: int, budget: int, window_size: int) -> None:
    if not 0 <= prefix_len < prompt_len:
        raise ValueError(f"prefix_len is {prefix_len}, must be in [0, {prompt_len - 1}]")
    suffix_len = prompt_len - prefix_len
    if not 1 <= window_size <= suffix_len:
        raise ValueError(f"window_size is {window_size}, must be in [1, {suffix_len}]")
    if not window_size <= budget <= suffix_len:
        raise ValueError(f"budget is {budget}, must be in [{window_size}, {suffix_len}]")


KEEP = {
    "lava": lava_keep,
    "lava_span": lava_span_keep,
    "snapkv": snapkv_keep,
    "adakv": adakv_keep,
    "pyramidkv": pyramidkv_keep,
    "streamingllm": streamingllm_keep,
}
"""Each scored method's keep masks, by the name of the method."""
