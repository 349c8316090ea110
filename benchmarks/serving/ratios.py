# SPDX-License-Identifier: Apache-2.0
"""Medians with their spread, and ratios of paired runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.measurement import Measurement

Value = Callable[[Measurement], float | None]


@dataclass(frozen=True)
class Spread:
    """Of one value over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def spread(measurements: Sequence[Measurement], target: str, value: Value) -> Spread | None:
    """None if the target has no such value in any repeat."""
    found = [value(m) for m in measurements if m.target == target]
    known = [number for number in found if number is not None]
    return Spread.of(known) if known else None


def paired_ratio(
    measurements: Sequence[Measurement], target: str, baseline: str, value: Value
) -> Spread | None:
    """Of `target` over `baseline`, repeat by repeat; None if no repeat has both."""
    by_repeat = {
        name: {m.repeat: value(m) for m in measurements if m.target == name}
        for name in (target, baseline)
    }
    ratios = []
    for repeat, above in by_repeat[target].items():
        below = by_repeat[baseline].get(repeat)
        if above is not None and below:
            ratios.append(above / below)
    return Spread.of(ratios) if ratios else None
