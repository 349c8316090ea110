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

STOCK = "1"
"""The budget that stands for stock SGLang."""


@dataclass(frozen=True)
class Point:
    """One simulation. prompt_tokens and rate are None of a trace that was read."""

    budget: str  # a number, or a ladder with commas
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


def settings_of(budget: str, settings: dict[str, Any]) -> KVCompressionConfig | None:
    """Those of `settings` with this budget; None for stock. Raises KVCompressionError."""
    if budget == STOCK:
        return None
    try:
        rungs: Any = tuple(float(rung) for rung in budget.split(","))
    except ValueError:
        rungs = budget  # the settings say what they accept
    return KVCompressionConfig.parse({**settings, "budget": rungs}, "--budgets: {}".format)


def sweep(
    server: ServerShape,
    costs: Costs,
    settings: dict[str, Any],
    budgets: Sequence[str],
    cases: Sequence[Case],
) -> Iterator[Point]:
    """Raises KVCompressionError for a budget that is none, before anything is simulated."""
    configs = {budget: settings_of(budget, settings) for budget in budgets}
    for case in cases:
        for budget, config in configs.items():
            begin = time.perf_counter()
            outcome = Simulation(server, costs, config).run(case.trace())
            seconds = time.perf_counter() - begin
            yield Point(budget, case.prompt_tokens, case.rate, outcome, seconds)
