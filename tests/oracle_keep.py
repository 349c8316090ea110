# SPDX-License-Identifier: Apache-2.0
"""Owns what each method keeps of an oracle's prefill, as a mask; shares no code with the plugin.

L layers, H KV heads, G query heads of a KV head, I prompt tokens, S scored ones. Ties go to the
lower head and token.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tests.oracle import Prefill


class Scored(NamedTuple):
    """Of one layer, what is before the window and behind the shared prefix."""

    attention: Tensor  # [H, G, S], mean over the window
    rms: Tensor  # [H, G, S], its weighted quadratic mean
    values: Tensor  # [H, S, D]
    pool_width: int


def snapkv_scores(layer: Scored) -> Tensor:
    """[H, S]: max-pooled window attention, averaged over the query heads of a KV head.
    Source: SnapKV, arXiv 2404.14469."""
    return _pool(layer.attention, layer.pool_width).mean(dim=1)


def lava_scores(layer: Scored) -> Tensor:
    """[H, S]: max-pooled window attention, the largest over the query heads, times the largest L1
    norm of the head's scored values. Source: LAVa, arXiv 2509.09754."""
    norms = layer.values.abs().sum(dim=2).max(dim=1).values
    return _pool(layer.attention, layer.pool_width).max(dim=1).values * norms[:, None]


def lava_span_scores(layer: Scored) -> Tensor:
    """[H, S]: what an entry adds to a query head's output, the root mean square of its window
    attention times the L2 norm of its value; or 0.3 of the most that one of the 16 scored tokens
    before it adds if that is more; the mean over the query heads."""
    added = layer.rms * layer.values.square().sum(dim=2).sqrt()[:, None]
    lifted = added.clone()
    for distance in range(1, min(16, added.shape[2] - 1) + 1):
        lifted[:, :, distance:] = lifted[:, :, distance:].maximum(0.3 * added[..., :-distance])
    return lifted.mean(dim=1)


def streamingllm_scores(layer: Scored) -> Tensor:
    """[H, S]: four sinks first, then the later the better. Source: arXiv 2309.17453."""
    heads, scored_len, _ = layer.values.shape
    places = torch.arange(scored_len, dtype=torch.float32)
    places[:4] += scored_len + 4 - 2 * places[:4]
    return places.expand(heads, -1)


def entropies(scores: Tensor) -> list[float]:
    """Of each layer's scores, normalised to [0, 1]."""
    if scores[0].numel() == 1:
        return [0.0] * len(scores)
    shares = scores.double().flatten(1)
    shares = shares / shares.sum(dim=1, keepdim=True)
    return (-torch.special.xlogy(shares, shares).sum(dim=1) / math.log(shares.shape[1])).tolist()


def pyramid(scores: Tensor) -> list[float]:
    """A line that falls to a twentieth of the mean in the last layer; the first one's is 1.
    Source: PyramidKV, arXiv 2406.02069."""
    if len(scores) == 1:
        return [1.0]
    first, last = 2 - 1 / 20, 1 / 20
    step = (last - first) / (len(scores) - 1)
    return [(first + step * layer) / first for layer in range(len(scores))]


def alike(scores: Tensor) -> list[float]:
    return [1.0] * len(scores)


@dataclass(frozen=True)
class Definition:
    """A method: a score, each layer's claim on the budget, and whether a layer's heads compete."""

    scores: Callable[[Scored], Tensor]
    claims: Callable[[Tensor], list[float]] = alike
    heads_compete: bool = False
    head_floor: Fraction = Fraction(0)  # of its layer's mean, where heads compete

    def __call__(
        self,
        prefill: Prefill,
        prefix_len: int,
        budget: int,
        window_size: int,
        pool_width: int = 7,
    ) -> Tensor:
        """Bool [L, H, I]: L * H * budget entries of the suffix in all; the prefix and the window
        are always kept. Of the budget, layers of a limited reach take what the next token sees; the
        mask hides nothing from them that they see."""
        layers, heads, prompt_len, _ = prefill.values.shape
        _check_budget(prefill, prefix_len, budget, window_size)
        scores = self.score(prefill, prefix_len, window_size, pool_width)
        whole = [layer for layer, reach in enumerate(prefill.reach) if reach is None]
        scored_len = prompt_len - window_size - prefix_len
        if self.uniform:
            total = len(whole) * (budget - window_size)
        else:
            seen = sum(max(reach - 1, window_size) for reach in prefill.reach if reach is not None)
            total = layers * budget - seen - len(whole) * window_size
            total = min(total, len(whole) * scored_len)
        keep = torch.ones(layers, heads, prompt_len, dtype=torch.bool)
        keep[whole, :, prefix_len : prompt_len - window_size] = self.choose(
            scores, self.claims(scores), total
        )
        return keep

    @property
    def uniform(self) -> bool:
        """Whether every head of every layer keeps equally many."""
        return self.claims is alike and not self.heads_compete

    def score(self, prefill: Prefill, prefix_len: int, window_size: int, pool_width: int) -> Tensor:
        """[whole layers, H, S], of those that see everything."""
        _, heads, prompt_len, _ = prefill.values.shape
        if pool_width < 1 or pool_width % 2 == 0:
            raise ValueError(f"pool_width is {pool_width}, must be odd and at least 1")
        scored = slice(prefix_len, prompt_len - window_size)
        return torch.stack(
            [
                self.scores(
                    Scored(
                        prefill.window_attention[layer, :, scored].unflatten(0, (heads, -1)),
                        prefill.window_rms[layer, :, scored].unflatten(0, (heads, -1)),
                        prefill.values[layer, :, scored],
                        pool_width,
                    )
                )
                for layer, reach in enumerate(prefill.reach)
                if reach is None
            ]
        )

    def choose(self, scores: Tensor, claims: Sequence[float], total: int) -> Tensor:
        """Bool [L, H, S]: on average `total` scored entries in the columns of one head, by these
        claims."""
        _, heads, scored_len = scores.shape
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        if self.heads_compete:
            counts = divide(claims, heads * total, heads * scored_len)
            for layer, count in enumerate(counts):
                floor = math.floor(self.head_floor * count / heads)
                for head in range(heads):
                    chosen[layer, head, _best(scores[layer, head])[:floor]] = True
                best = _best(scores[layer].flatten())
                best = best[~chosen[layer].view(-1)[best]]
                chosen[layer].view(-1)[best[: count - heads * floor]] = True
            return chosen
        for layer, count in enumerate(divide(claims, total, scored_len)):
            for head in range(heads):
                chosen[layer, head, _best(scores[layer, head])[:count]] = True
        return chosen


KEEP = {
    "lava": Definition(lava_scores, entropies, heads_compete=True),
    "lava_span": Definition(lava_span_scores, heads_compete=True, head_floor=Fraction(1, 5)),
    "snapkv": Definition(snapkv_scores),
    "adakv": Definition(snapkv_scores, heads_compete=True, head_floor=Fraction(1, 5)),
    "pyramidkv": Definition(snapkv_scores, pyramid),
    "streamingllm": Definition(streamingllm_scores),
}
"""Each method but the random one, by its name. AdaKV's source: arXiv 2407.11550."""


class _Keep(Protocol):
    def __call__(
        self, prefill: Prefill, prefix_len: int, budget: int, window_size: int
    ) -> Tensor: ...


def per_rank_keep(
    keep: _Keep, prefill: Prefill, tp_size: int, prefix_len: int, budget: int, window_size: int
) -> Tensor:
    """A choice under tensor parallelism, bool [L, H, I]: each of `tp_size` ranks holds H / tp_size
    KV heads and keeps L * H / tp_size * budget of their entries."""
    heads = prefill.values.shape[1]
    if heads % tp_size:
        raise ValueError(f"tp_size is {tp_size}, must divide {heads} KV heads")
    parts = zip(
        prefill.keys.chunk(tp_size, dim=1),
        prefill.values.chunk(tp_size, dim=1),
        prefill.window_queries.chunk(tp_size, dim=1),
        prefill.window_attention.chunk(tp_size, dim=1),
        prefill.window_rms.chunk(tp_size, dim=1),
        strict=True,
    )
    kept = []
    for keys, values, queries, attention, rms in parts:
        of_rank = replace(
            prefill,
            keys=keys,
            values=values,
            window_queries=queries,
            window_attention=attention,
            window_rms=rms,
        )
        kept.append(keep(of_rank, prefix_len, budget, window_size))
    return torch.cat(kept, dim=1)


def divide(claims: Sequence[float], total: int, most: int) -> list[int]:
    """`total` seats by Webster's method, one at a time, ties to the lower index, `most` each.
    Claims are counted in units of 2^-30, one at least."""
    units = [max(1, round(claim * 2**30)) for claim in claims]
    seats = [0] * len(units)
    queue = [(Fraction(-unit), index) for index, unit in enumerate(units)]
    heapq.heapify(queue)
    for _ in range(total):
        _, index = heapq.heappop(queue)
        seats[index] += 1
        if seats[index] < most:
            heapq.heappush(queue, (Fraction(-units[index], 2 * seats[index] + 1), index))
    return seats


def _best(scores: Tensor) -> Tensor:
    """Places in the order of their scores, the best first."""
    return torch.sort(scores, descending=True, stable=True).indices


def _pool(attention: Tensor, width: int) -> Tensor:
    """The maximum over `width` neighbouring tokens, ends clipped; [H, G, S]."""
    return torch.nn.functional.max_pool1d(attention, width, stride=1, padding=width // 2)


def _check_budget(prefill: Prefill, prefix_len: int, budget: int, window_size: int) -> None:
    prompt_len = prefill.values.shape[2]
    if not 0 <= prefix_len < prompt_len:
        raise ValueError(f"prefix_len is {prefix_len}, must be in [0, {prompt_len - 1}]")
    suffix_len = prompt_len - prefix_len
    if not 1 <= window_size <= suffix_len:
        raise ValueError(f"window_size is {window_size}, must be in [1, {suffix_len}]")
    if not window_size <= budget <= suffix_len:
        raise ValueError(f"budget is {budget}, must be in [{window_size}, {suffix_len}]")
    if prefill.window_start != prompt_len - window_size:
        raise ValueError(
            f"window_size is {window_size}, must be {prompt_len - prefill.window_start}, "
            "the window that the prefill recorded"
        )
