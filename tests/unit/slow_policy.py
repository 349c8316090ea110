# SPDX-License-Identifier: Apache-2.0
"""Every method by its definition, in loops over single numbers; it shares no code with ours."""

import math
from fractions import Fraction
from typing import NamedTuple

from lava_sglang.policy import PromptView


class Options(NamedTuple):
    """Settings that replace a method's own rules."""

    uniform_layers: bool = False
    uniform_heads: bool = False
    head_floor: float | None = None


NO_OPTIONS = Options()


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def window_attention(prompt: PromptView, layer: int) -> list[list[list[list[float]]]]:
    """Float64 [num_kv_heads][group][window queries][prompt tokens]; 0 for tokens not yet seen."""
    assert prompt.queries is not None and prompt.scaling is not None
    num_queries, num_qo_heads, _ = prompt.queries[layer].shape
    prompt_len, num_kv_heads = len(prompt.slots), prompt.num_kv_heads
    queries = prompt.queries[layer].tolist()
    keys = prompt.arena[layer, 0, prompt.slots].tolist()
    scaling = float(prompt.scaling[layer])
    group = num_qo_heads // num_kv_heads
    attention = []
    for kv_head in range(num_kv_heads):
        heads = []
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            rows = []
            for place in range(num_queries):
                seen = prompt_len - num_queries + place + 1
                weights = [
                    math.exp(scaling * dot(queries[place][query_head], keys[t][kv_head]))
                    for t in range(seen)
                ]
                total = sum(weights)
                rows.append([w / total for w in weights] + [0.0] * (prompt_len - seen))
            heads.append(rows)
        attention.append(heads)
    return attention


def pooled_attention(prompt: PromptView, layer: int, pool_width: int) -> list[list[list[float]]]:
    """Float64 [num_kv_heads][group][scored tokens]: mean window attention, then the maximum."""
    first, last = prompt.shared_prefix_len, len(prompt.slots) - prompt.window_size
    half = pool_width // 2
    pooled = []
    for query_heads in window_attention(prompt, layer):
        pooled_heads = []
        for rows in query_heads:
            mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
            pooled_heads.append(
                [
                    max(mean[max(first, t - half) : min(last, t + half + 1)])
                    for t in range(first, last)
                ]
            )
        pooled.append(pooled_heads)
    return pooled


Scores = list[list[list[float]]]  # [num_layers][num_kv_heads][scored tokens]


def snapkv_scores(prompt: PromptView, pool_width: int) -> Scores:
    """SnapKV by its definition: the mean over the query heads of a group."""
    return [
        [
            [sum(column) / len(column) for column in zip(*query_heads, strict=True)]
            for query_heads in pooled_attention(prompt, layer, pool_width)
        ]
        for layer in range(prompt.num_layers)
    ]


def lava_scores(prompt: PromptView, pool_width: int) -> Scores:
    """LAVa by its definition: the group's maximum, times the head's largest value norm."""
    scores = []
    last = len(prompt.slots) - prompt.window_size
    for layer in range(prompt.num_layers):
        values = prompt.arena[layer, 1, prompt.slots].tolist()
        heads = []
        for head, query_heads in enumerate(pooled_attention(prompt, layer, pool_width)):
            norm = max(
                sum(abs(number) for number in values[token][head])
                for token in range(prompt.shared_prefix_len, last)
            )
            heads.append([max(column) * norm for column in zip(*query_heads, strict=True)])
        scores.append(heads)
    return scores


def lava_span_scores(prompt: PromptView, pool_width: int) -> Scores:
    """LAVaSpan by its definition: what an entry adds in the root mean square, and 0.3 of it for
    the 16 tokens after it; the mean over the query heads of a group. No max-pool."""
    scores = []
    first, last = prompt.shared_prefix_len, len(prompt.slots) - prompt.window_size
    for layer in range(prompt.num_layers):
        values = prompt.arena[layer, 1, prompt.slots].tolist()
        heads = []
        for head, query_heads in enumerate(window_attention(prompt, layer)):
            mean = [0.0] * (last - first)
            for rows in query_heads:
                weights = [math.exp(place / 8) for place in range(len(rows))]
                added = []
                for token in range(first, last):
                    squares = [w * row[token] ** 2 for w, row in zip(weights, rows, strict=True)]
                    attention = math.sqrt(sum(squares) / sum(weights))
                    added.append(attention * math.hypot(*values[token][head]))
                for token, own in enumerate(added):
                    before = [0.3 * size for size in added[max(0, token - 16) : token]]
                    mean[token] += max([own, *before]) / len(query_heads)
            heads.append(mean)
        scores.append(heads)
    return scores


DEFINITIONS = {
    "snapkv": snapkv_scores,
    "adakv": snapkv_scores,
    "pyramidkv": snapkv_scores,
    "lava": lava_scores,
    "lava_span": lava_span_scores,
}


def entropy(scores: list[list[float]]) -> float:
    """Of one layer's scores, normalised to [0, 1]."""
    numbers = [score for head in scores for score in head]
    shares = [number / sum(numbers) for number in numbers]
    if len(shares) == 1:
        return 0.0
    return -sum(share * math.log(share) for share in shares if share) / math.log(len(shares))


def slow_weights(name: str, scores: Scores) -> list[float]:
    """Each layer's claim on the budget: its entropy, or a line to a twentieth of the mean."""
    num_layers = len(scores)
    if name == "lava":
        return [entropy(layer) for layer in scores]
    if name == "pyramidkv" and num_layers > 1:
        first, last = 2 - 1 / 20, 1 / 20  # of the mean
        step = (last - first) / (num_layers - 1)
        return [(first + step * layer) / first for layer in range(num_layers)]
    return [1.0] * num_layers


def divide(weights: list[float], total: int, most: int) -> list[int]:
    """Entry by entry to the largest weight / (2 * held + 1) that is not full, ties to the lower."""
    units = [max(1, round(weight * 2**30)) for weight in weights]
    held = [0] * len(weights)
    for _ in range(total):
        claims = [
            (Fraction(unit, 2 * count + 1), -layer)
            for layer, (unit, count) in enumerate(zip(units, held, strict=True))
            if count < most
        ]
        held[-max(claims)[1]] += 1
    return held


def best_entries(scores: list[list[float]], count: int, floor: int) -> list[list[int]]:
    """Of one layer, [num_kv_heads][scored tokens kept]: a floor in each head, then the best."""
    kept: list[set[int]] = []
    for head in scores:
        order = sorted(range(len(head)), key=lambda token: (-head[token], token))
        kept.append(set(order[:floor]))
    rest = [
        (-score, head, token)
        for head, numbers in enumerate(scores)
        for token, score in enumerate(numbers)
        if token not in kept[head]
    ]
    for _, head, token in sorted(rest)[: count - floor * len(scores)]:
        kept[head].add(token)
    return [sorted(tokens) for tokens in kept]


OWN_FLOORS = {"lava": Fraction(0), "lava_span": Fraction(1, 5), "adakv": Fraction(1, 5)}
"""Of the methods in which heads compete: the share of its layer's mean that a head is sure of."""


def slow_keep(
    name: str,
    scores: Scores,
    weights: list[float],
    mean: int,
    options: Options = NO_OPTIONS,
) -> list[list[list[int]]]:
    """Scored tokens that each method keeps, by its definition: [num_layers][num_kv_heads][kept]."""
    num_kv_heads, scored_len = len(scores[0]), len(scores[0][0])
    if options.uniform_layers:
        weights = [1.0] * len(scores)
    if name in OWN_FLOORS and not options.uniform_heads:
        most = num_kv_heads * scored_len
        counts = divide(weights, len(scores) * num_kv_heads * mean, most)
        given_share = options.head_floor
        share = OWN_FLOORS[name] if given_share is None else Fraction(str(given_share))
        floors = [math.floor(share * count / num_kv_heads) for count in counts]
        return [best_entries(*layer) for layer in zip(scores, counts, floors, strict=True)]
    counts = divide(weights, len(scores) * mean, scored_len)
    return [
        [best_entries([head], count, 0)[0] for head in layer]
        for layer, count in zip(scores, counts, strict=True)
    ]
