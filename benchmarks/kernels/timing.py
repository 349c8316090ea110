# SPDX-License-Identifier: Apache-2.0
"""Seconds of repeated calls: their median and spread."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Timing:
    """Seconds of one call."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    def quantile(self, fraction: float) -> float:
        return float(np.quantile(self.samples, fraction))

    def milliseconds(self) -> str:
        """Median [10% - 90%] minimum."""
        low, high = self.quantile(0.1) * 1e3, self.quantile(0.9) * 1e3
        return f"{self.median * 1e3:.2f} [{low:.2f} - {high:.2f}] {self.minimum * 1e3:.2f}"

    def as_json(self) -> dict[str, float]:
        return {
            "median": self.median,
            "minimum": self.minimum,
            "p10": self.quantile(0.1),
            "p90": self.quantile(0.9),
            "calls": len(self.samples),
        }
