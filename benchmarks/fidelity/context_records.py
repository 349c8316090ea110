# SPDX-License-Identifier: Apache-2.0
"""What `divergence` records of one context: its continuation, and a record for each choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from contexts import Context
from divergence_summary import FULL
from results import Results

LEAST_NEW_TOKENS = 16
"""A model's own answer with fewer compared tokens is left out."""


class ContextRecords:
    """The records of one context, and the CPU seconds of this process since the one before."""

    def __init__(self, context: Context, new_tokens: int, results: Results):
        """new_tokens: compared ones, at most."""
        self.context = context
        self.new_tokens = new_tokens
        self.results = results
        self.started = time.process_time()

    def continuation(self, answer: Callable[[int], list[int]]) -> list[int] | None:
        """The new tokens; None if they are too few. Adds the record of the full prompt if it is
        missing.

        The text's own, or those that an earlier run recorded, or those of `answer`, which takes
        how many.
        """
        full = self.results.get(self.context.name, FULL, None)
        if self.context.continuation is not None:
            tokens = self.context.continuation
        elif full is not None:
            tokens = list(full["continuation"])
        else:
            tokens = answer(self.new_tokens + 1)
        # The first new token comes from the exact prompt on a server too: it is fed, not compared.
        skipped = len(tokens) - 1 < min(LEAST_NEW_TOKENS, self.new_tokens)
        if full is None:
            size = len(self.context.prompt)
            self.add(FULL, None, size, skipped=skipped, continuation=tokens)
        return None if skipped else tokens

    def add(self, method: str, budget: float | None, kept: float, **values: Any) -> None:
        now = time.process_time()
        record = {
            "context": self.context.name,
            "source": self.context.source,
            "prompt_tokens": len(self.context.prompt),
            "method": method,
            "budget": budget,
            "kept_tokens": kept,
            **values,
            "cpu_seconds": round(now - self.started, 4),
        }
        self.started = now
        self.results.add(record)
