# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from simulator.calibration import METRICS, Prediction
from simulator.outcome import quantile
from simulator.sweep import STOCK, Point

Series = Callable[[Point], float]


def sweep_table(title: str, points: Sequence[Point]) -> Table:
    """A row for each point; a column that says the same of all is left out."""
    columns: dict[str, Callable[[Point], str]] = {
        "prompt": lambda p: "-" if p.prompt_tokens is None else f"{p.prompt_tokens:,}",
        "rate": lambda p: "-" if p.rate is None else f"{p.rate:g}",
        "budget": lambda p: _budget(p.budget),
        "requests/s": lambda p: f"{p.outcome.request_throughput:.2f}",
        "tokens/s": lambda p: f"{p.outcome.output_throughput:,.0f}",
        "x stock": lambda p: _ratio(points, p),
        "prefill": lambda p: f"{p.outcome.prefill_share:.0%}",
        "running": lambda p: f"{p.outcome.mean_running:.1f}",
        "peak": lambda p: f"{p.outcome.peak_running}",
        "TTFT p50": lambda p: f"{quantile(p.outcome.ttft, 50):,.1f}",
        "p99": lambda p: f"{quantile(p.outcome.ttft, 99):,.1f}",
        "TPOT ms": lambda p: f"{quantile(p.outcome.tpot, 50) * 1e3:.0f}",
        "kept": lambda p: f"{p.outcome.kept_share:.0%}",
        "trims": lambda p: f"{p.outcome.trims:,}",
        "retracted": lambda p: f"{p.outcome.retractions:,}",
        "refused": lambda p: f"{p.outcome.refused:,}",
    }
    table = Table(
        title=title,
        caption="A model, not a measurement: SGLang's and our admission on counts of slots, with "
        "modelled times. tokens/s and x stock: output tokens. prefill: its part of the time. "
        "running, peak: requests in a decode step. kept: of the compressed suffixes. TTFT: seconds "
        "with the queue.",
    )
    shown = {}
    for heading, cell in columns.items():
        cells = [cell(point) for point in points]
        if len(set(cells)) > 1 or len(points) == 1:
            shown[heading] = cells
    for heading in shown:
        table.add_column(heading, justify="right")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def calibration_table(predictions: Sequence[Prediction]) -> Table:
    """Measured, predicted and the error, a column for each target."""
    table = Table(
        title="measured > predicted (error)",
        caption="*: the costs were fitted to this target's own runs. Medians over the repeats.",
    )
    table.add_column("")
    for prediction in predictions:
        table.add_column(prediction.target + ("*" if prediction.fitted else ""), justify="right")
    for heading, name in METRICS.items():
        table.add_row(heading, *(_compared(prediction, name) for prediction in predictions))
    baseline = predictions[0]
    cells = []
    for prediction in predictions:
        name = "output_throughput"
        measured = prediction.measured[name] / baseline.measured[name]
        predicted = prediction.predicted[name] / baseline.predicted[name]
        cells.append(f"{measured:.2f} > {predicted:.2f} ({predicted / measured - 1:+.0%})")
    table.add_row(f"output throughput, x {baseline.target}", *cells)
    return table


def plot_budgets(title: str, points: Sequence[Point], path: Path) -> None:
    """Over the budget, a line for each prompt length."""
    panels: dict[str, Series] = {
        "output throughput, times stock": lambda p: _times_stock(points, p) or 0.0,
        "requests in a decode step, mean": lambda p: p.outcome.mean_running,
        "part of the time in prefill": lambda p: p.outcome.prefill_share,
        "time per output token, p50 (ms)": lambda p: quantile(p.outcome.tpot, 50) * 1e3,
    }
    budgets = list(dict.fromkeys(point.budget for point in points))

    def place(point: Point) -> float:
        return float(budgets.index(point.budget))

    lengths = list(dict.fromkeys(point.prompt_tokens for point in points))
    lines = {
        f"{length:,} prompt tokens" if length else "the trace": sorted(
            (point for point in points if point.prompt_tokens == length), key=place
        )
        for length in lengths
    }
    figure, axes = _figure(title)
    _draw(axes, panels, lines, place)
    for each in axes:
        each.set_xticks(range(len(budgets)), [_budget(budget) for budget in budgets])
        each.set_xlabel("budget")
    figure.savefig(path, dpi=150)


def plot_rates(title: str, points: Sequence[Point], path: Path) -> None:
    """Over the request rate, a line for each budget."""
    panels: dict[str, Series] = {
        "requests/s answered": lambda p: p.outcome.request_throughput,
        "time to the first token, p99 (s)": lambda p: quantile(p.outcome.ttft, 99),
        "requests in a decode step, mean": lambda p: p.outcome.mean_running,
        "part of the suffixes that was kept": lambda p: p.outcome.kept_share,
    }
    lines = {
        _budget(budget): [point for point in points if point.budget == budget]
        for budget in dict.fromkeys(point.budget for point in points)
    }
    figure, axes = _figure(title)
    _draw(axes, panels, lines, lambda point: point.rate or 0.0)
    for each in axes:
        each.set_xlabel("requests/s arriving")
    axes[1].set_yscale("log")
    axes[1].autoscale()
    figure.savefig(path, dpi=150)


def _figure(title: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(f"{title}\na model, not a measurement", fontsize=10)
    return figure, list(figure.subplots(2, 2).flat)


def _draw(
    axes: Sequence[Any],
    panels: dict[str, Series],
    lines: dict[str, list[Point]],
    place: Callable[[Point], float],
) -> None:
    for each, (heading, value) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            each.plot([place(p) for p in points], [value(p) for p in points], ".-", label=label)
        each.set_title(heading, fontsize=10)
        each.set_ylim(bottom=0)
        each.grid(True, alpha=0.3)
    axes[0].legend(fontsize=8)


def _times_stock(points: Sequence[Point], point: Point) -> float | None:
    for other in points:
        same = (other.prompt_tokens, other.rate) == (point.prompt_tokens, point.rate)
        if same and other.budget == STOCK and other.outcome.output_throughput:
            return point.outcome.output_throughput / other.outcome.output_throughput
    return None


def _ratio(points: Sequence[Point], point: Point) -> str:
    ratio = _times_stock(points, point)
    return "-" if ratio is None else f"{ratio:.2f}"


def _budget(budget: str) -> str:
    return "stock" if budget == STOCK else budget


def _compared(prediction: Prediction, name: str) -> str:
    measured, predicted = prediction.measured[name], prediction.predicted[name]
    error = prediction.error(name)
    if name == "prefill_share":
        return f"{measured:.0%} > {predicted:.0%}"
    digits = ".0f" if name in ("peak_running", "retractions") else ".1f"
    ending = "" if error is None else f" ({error:+.0%})"
    return f"{measured:{digits}} > {predicted:{digits}}{ending}"
