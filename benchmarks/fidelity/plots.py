# SPDX-License-Identifier: Apache-2.0
"""What the pictures of the commands share, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.fidelity.bootstrap import Estimate

PANEL = (4.5, 3.6)  # inches


def line(
    axes: Any, number: int, label: str, budgets: Sequence[float], estimates: Sequence[Estimate]
) -> None:
    """A method's line; `number` gives it the same colour in every panel."""
    values = [estimate.value for estimate in estimates]
    spans = [
        [estimate.value - estimate.low for estimate in estimates],
        [estimate.high - estimate.value for estimate in estimates],
    ]
    style = {"color": f"C{number}", "marker": "o", "markersize": 3, "capsize": 2}
    axes.errorbar(budgets, values, yerr=spans, label=label, **style)


def budget_axis(axes: Any, budgets: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("budget, entries per layer and head")
    axes.grid(alpha=0.3)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
