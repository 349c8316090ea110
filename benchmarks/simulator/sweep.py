# SPDX-License-Identifier: Apache-2.0
"""Many simulations: every budget, at every prompt length and request rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lava_sglang.config import KVCompressionConfig
from simulator.costs import Costs
from simulator.outcome import Outcome
from simulator.simulation import ServerShape, Simulation
from simulator.trace import Arrival

STOCK = 1.0
"""The budget that stands for stock SGLang."""


@dataclass(frozen=True)
class Point:
    """One simulation. prompt_tokens and rate are None of a trace that was read."""

    budget: float
    prompt_tokens: int | None
    rate: float | None
    outcome: Outcome
    wall_seconds: float  # that it took to simulate

    def as_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "prompt_tokens": self.prompt_tokens,
            "rate": None if self.rate == float("inf") else self.rate,
            "wall_seconds": self.wall_seconds,
            **self.outcome.as_json(),
        }


@dataclass(frozen=True)
class Case:
    """A load and how to make its trace, anew for each budget."""

    prompt_tokens: int | None
    rate: float | None
    trace: Callable[[], Iterable[Arrival]]


def sweep(
    server: ServerShape,
    costs: Costs,
    config: KVCompressionConfig,
    budgets: Sequence[float],
    cases: Sequence[Case],
) -> Iterator[Point]:
    """Budget 1 is stock SGLang. Raises KVCompressionError for a budget that is none."""
    settings = config.model_dump()
    for case in cases:
        for budget in budgets:
            own = None
            if budget != STOCK:
                values = {**settings, "budget": budget}
                own = KVCompressionConfig.parse(values, "--budgets {}".format)
            begin = time.perf_counter()
            outcome = Simulation(server, costs, own).run(case.trace())
            seconds = time.perf_counter() - begin
            yield Point(budget, case.prompt_tokens, case.rate, outcome, seconds)
