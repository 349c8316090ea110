# SPDX-License-Identifier: Apache-2.0
"""Owns the oracle of long answers: what each head still has is chosen again as the answer grows.

It shares no code with the plugin. A stretch of the answer between two choices is one forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tests.oracle import How, Oracle, Prefill, Step, step_of
from tests.oracle_keep import KEEP, Scored


@dataclass(frozen=True)
class Rule:
    """When a long answer is chosen from, and by what; lengths in tokens."""

    method: Literal["lava", "snapkv"]
    prefix_len: int  # of the prompt, shared: never chosen from
    window_size: int  # w, answer tokens whose queries choose and whose entries stay
    interval: int  # the longest tail that a decode step starts with
    pool_width: int = 7


class LongAnswer(NamedTuple):
    """A decoded answer of n tokens, and every choice on its way."""

    steps: list[Step]
    logprobs: Tensor  # [n], of the tokens that were said
    keeps: list[Tensor]  # bool [L, H, tokens so far], what was attended to from each choice on


class _Stretch:
    """Attention of consecutive answer tokens over the entries that each head has, and themselves.

    keys, values: [L, H, T, D], of all tokens so far. keep: bool [L, H, T].
    """

    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor) -> None:
        self.past = (keys, values, keep)
        self.queries: list[Tensor] = []  # [Q, q, D] a layer, after RoPE
        self.keys: list[Tensor] = []  # [H, q, D] a layer
        self.values: list[Tensor] = []
        self.scale = 1.0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        assert how.reach is None and how.cap is None, "answers of plain models only"
        self.queries.append(query)
        self.keys.append(key)
        self.values.append(value)
        self.scale = how.scale
        past_keys, past_values, keep = (past[layer] for past in self.past)
        heads, length, _ = key.shape
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = torch.cat([keep[:, None].expand(-1, length, -1), causal.expand(heads, -1, -1)], 2)
        grouped = query.unflatten(0, (heads, -1))  # [H, G, q, D]
        scores = grouped @ torch.cat([past_keys, key], dim=1)[:, None].mT * how.scale
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=3)
        output = weights @ torch.cat([past_values, value], dim=1)[:, None]
        return output.flatten(0, 1).transpose(0, 1)


def long_answer(
    oracle: Oracle, prefill: Prefill, keep: Tensor, rule: Rule | None, tokens: Sequence[int]
) -> LongAnswer:
    """The oracle's steps where `tokens` were said, one or more; without a rule nothing is dropped.

    keep: bool [L, H, I], the prompt entries that steps after the first attend to. The first token
    comes from the exact prompt. Before the decode step whose tail is longer than the
    interval, entries are chosen again, from all that is left of prompt and answer.
    """
    fed = list(tokens[:-1])
    stride = len(fed) if rule is None else rule.interval + 1
    keys, values = prefill.keys, prefill.values
    logits = [prefill.logits[None]]
    keeps = [keep]
    for start in range(0, len(fed), max(stride, 1)):
        said = fed[start : start + stride]
        stretch = _Stretch(keys, values, keep)
        position = len(prefill.input_ids) + start
        logits.append(oracle.forward(said, position, stretch, len(said)))
        keys = torch.cat([keys, torch.stack(stretch.keys)], dim=2)
        values = torch.cat([values, torch.stack(stretch.values)], dim=2)
        keep = torch.cat([keep, torch.ones(*keep.shape[:2], len(said), dtype=torch.bool)], dim=2)
        if rule is not None and start + stride < len(fed):
            keep = _choose_again(stretch, keys, values, keep, len(said), rule)
            keeps.append(keep)
    rows = torch.cat(logits)
    steps = [step_of(row, token) for row, token in zip(rows, tokens, strict=True)]
    logprobs = rows.log_softmax(dim=1)[torch.arange(len(steps)), torch.tensor(tokens)]
    return LongAnswer(steps, logprobs, keeps)


def _choose_again(
    stretch: _Stretch, keys: Tensor, values: Tensor, keep: Tensor, tail_len: int, rule: Rule
) -> Tensor:
    """Bool [L, H, T]: as many entries in each layer as before its last `tail_len` ones came."""
    layers, heads, _ = keep.shape
    chosen = keep.clone()
    for layer in range(layers):
        queries = stretch.queries[layer][:, -rule.window_size :].unflatten(0, (heads, -1))
        scored, scores = [], []
        for head in range(heads):
            own = keep[layer, head].nonzero().flatten()
            scored.append(own[rule.prefix_len : -rule.window_size])
            scores.append(
                _scores(
                    queries[head],
                    keys[layer, head, own],
                    values[layer, head, own],
                    stretch.scale,
                    rule,
                )
            )
            chosen[layer, head, scored[head]] = False
        counts = [len(own) - tail_len for own in scored]  # the window stays too
        if not KEEP[rule.method].heads_compete:
            for head in range(heads):
                best = torch.sort(scores[head], descending=True, stable=True).indices
                chosen[layer, head, scored[head][best[: counts[head]]]] = True
        else:
            owner = torch.cat([torch.full_like(own, head) for head, own in enumerate(scored)])
            best = torch.sort(torch.cat(scores), descending=True, stable=True).indices
            best = best[: sum(counts)]
            chosen[layer, owner[best], torch.cat(scored)[best]] = True
    return chosen


def _scores(queries: Tensor, keys: Tensor, values: Tensor, scale: float, rule: Rule) -> Tensor:
    """One head's [n - prefix - w] of queries [G, w, D], keys and values [n, D]: all it has."""
    window, count = queries.shape[1], len(keys)
    future = torch.arange(count) > torch.arange(count - window, count)[:, None]  # [w, n]
    logits = (queries @ keys.T * scale).masked_fill(future, -torch.inf)
    attention = logits.softmax(dim=2).mean(dim=1)[None, :, rule.prefix_len : -window]
    own = Scored(attention, attention, values[None, rule.prefix_len : -window], rule.pool_width)
    return KEEP[rule.method].scores(own)[0]
