# SPDX-License-Identifier: Apache-2.0
"""One context through a server: its log-probabilities along a forced reply, exact and compressed.

The server tells them of the exact prompt's most likely tokens only; the others count as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

from client import ForcedReply, ServerClient, settings_of
from context_records import ContextRecords
from results import Record

REST_FLOOR = 1e-5
"""Probability of all other tokens together, at least: float32 holds it no better next to 1."""


class ServerComparison:
    """Its exact log-probabilities, then those of each choice."""

    def __init__(
        self,
        server: ServerClient,
        records: ContextRecords,
        top_tokens: int,
        end_tokens: Sequence[int],
    ):
        """top_tokens: the most likely ones of the exact prompt, watched at each new token.
        end_tokens: end the model's own answer."""
        self.server = server
        self.records = records
        self.prompt = records.context.prompt
        self.top_tokens = top_tokens
        self.end_tokens = end_tokens

    def run(self, pairs: Iterable[tuple[str, float]]) -> None:
        """Adds a record for each (method, budget), and one for the full prompt if there is none."""
        continuation = self.records.continuation(self._answer)
        if continuation is None:
            return
        targets = continuation[1:]
        likely = self.server.likely_tokens(self.prompt, continuation, self.top_tokens)
        watched = [
            [target, *(token for token in tokens if token != target)][: self.top_tokens]
            for target, tokens in zip(targets, likely, strict=True)
        ]
        expected = self.server.force(self.prompt, continuation, watched, {"enabled": False})
        for method, budget in pairs:
            settings = settings_of(method, budget)
            found = self.server.force(self.prompt, continuation, watched, settings)
            if not found.compressed and found.reason != "budget_covers_suffix":
                name = self.records.context.name
                raise RuntimeError(f"{name}: the server did not compress it: {found.reason}")
            self.records.add(method, budget, found.kept_tokens, **compare(expected, found))

    def _answer(self, count: int) -> list[int]:
        """The model's own, from the exact prompt, to before its first end token."""
        reply = self.server.generate(self.prompt, count, {"enabled": False}).output_ids
        return list(takewhile(lambda token: token not in self.end_tokens, reply))


def compare(expected: ForcedReply, found: ForcedReply) -> Record:
    """What `divergence.compare` returns, from the log-probabilities [T, k] of a server.

    Both replies watch the same tokens, the first of each step the one that came. kl counts the
    tokens that are not watched as one: it is below the KL of the whole vocabulary or equal.
    """
    steps = list(zip(expected.watched, found.watched, strict=True))
    best = [row.index(max(row)) for row in expected.watched]
    tokens = zip(best, found.watched, found.most_likely, strict=True)
    return {
        "kl": _mean([_kl(row, other) for row, other in steps]),
        # The same float32 number, shifted: equal if it is the same token.
        "top1": _mean([float(row[index] >= most) for index, row, most in tokens]),
        "nll_change": _mean([row[0] - other[0] for row, other in steps]),
    }


def _kl(expected: Sequence[float], found: Sequence[float]) -> float:
    """KL over the watched tokens and the rest as one class, log-probabilities in nats."""
    known = sum(math.exp(p) * (p - q) for p, q in zip(expected, found, strict=True))
    rest, other = _rest(expected), _rest(found)
    return known + rest * math.log(rest / other)


def _rest(row: Sequence[float]) -> float:
    return max(1 - sum(math.exp(value) for value in row), REST_FLOOR)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
