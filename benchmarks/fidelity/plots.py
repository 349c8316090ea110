# SPDX-License-Identifier: Apache-2.0
"""Pictures of the summaries, with matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import needle_summary
import tasks_summary
from bootstrap import Estimate
from divergence_summary import cells as divergence_cells
from haystack import DEPTH_BINS
from matplotlib.ticker import NullLocator, ScalarFormatter
from needle_summary import FULL, INSIDE
from results import Record

PANEL = (4.5, 3.6)  # inches


def plot_divergence(records: Iterable[Record], path: Path, reference: str) -> None:
    """KL by budget, and its ratio to the reference's, one line a method, 95 % intervals."""
    by_budget = divergence_cells(list(records), reference)
    tokens = [budget for budget in by_budget if budget > 1]
    methods = dict.fromkeys(method for budget in tokens for method in by_budget[budget])
    size = (2 * PANEL[0] + 2, PANEL[1])  # 2 for the legend, which covers no line
    figure, (kl, ratio) = plt.subplots(1, 2, figsize=size, layout="constrained")
    for number, method in enumerate(methods):
        at = [budget for budget in tokens if method in by_budget[budget]]
        _line(kl, number, method, at, [by_budget[budget][method].kl for budget in at])
        at = [budget for budget in at if by_budget[budget][method].ratio is not None]
        if method != reference:
            _line(ratio, number, method, at, [by_budget[budget][method].ratio for budget in at])
    ratio.axhline(1, color="black", linewidth=0.8)
    kl.set_title("KL(full || compressed), nats per token")
    ratio.set_title(f"KL, ratio to {reference}")
    for axes in (kl, ratio):
        axes.set_yscale("log")
        _budget_axis(axes, tokens)
    figure.legend(*kl.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    _save(figure, path)


def plot_needles(records: Iterable[Record], path: Path) -> None:
    """Exact match by budget, a panel for each kind and place of the question."""
    groups = needle_summary.cells(list(records))
    if not groups:
        raise ValueError("no needle was found in full: nothing to draw")
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    size = (columns * PANEL[0], rows * PANEL[1])
    figure, panels = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (group, by_choice) in zip(panels.flat, groups.items(), strict=False):
        methods = dict.fromkeys(method for method, _ in by_choice if method != FULL)
        for number, method in enumerate(methods):
            at = sorted(b for name, b in by_choice if name == method and b is not None and b > 1)
            found = [by_choice[method, budget].exact_match for budget in at]
            _line(axes, number, method, at, found)
            _budget_axis(axes, at)
        axes.set_title(f"{group.kind}, question {group.question}", fontsize="medium")
        axes.set_ylim(-0.05, 1.05)
    panels[0, 0].legend(fontsize="small")
    _save(figure, path)


def plot_depths(records: Iterable[Record], path: Path, question: str = INSIDE) -> None:
    """Exact match by length and depth, all kinds together; methods in rows, budgets in columns."""
    by_choice: dict[tuple[str, float], list[Record]] = {}
    for record in needle_summary.answerable(records):
        if record["method"] != FULL and record["question"] == question:
            by_choice.setdefault((record["method"], record["budget"]), []).append(record)
    if not by_choice:
        raise ValueError(
            f"no needle with the question {question} was found in full: nothing to draw"
        )
    methods = list(dict.fromkeys(method for method, _ in by_choice))
    budgets = sorted({budget for _, budget in by_choice}, key=lambda b: (b <= 1, b))
    lengths = sorted({record["length"] for found in by_choice.values() for record in found})
    figure, panels = plt.subplots(
        len(methods),
        len(budgets),
        figsize=(2.6 * len(budgets), 2.2 * len(methods)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (method, budget), found in by_choice.items():
        axes = panels[methods.index(method), budgets.index(budget)]
        rows = depth_by_length(found, lengths)
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{method}, b={budget:g}", fontsize="medium")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(DEPTH_BINS), [f"{i / DEPTH_BINS:g}" for i in range(DEPTH_BINS)])
    figure.colorbar(image, ax=panels, label="exact match")
    figure.supxlabel("tokens of the prompt")
    figure.supylabel("depth of the needle")
    _save(figure, path)


def depth_by_length(records: Iterable[Record], lengths: Sequence[int]) -> list[list[float]]:
    """Mean exact match, DEPTH_BINS rows from the start of the text; NaN where there is none."""
    hits: dict[tuple[int, int], list[float]] = {}
    for record in records:
        part = min(int(record["depth"] * DEPTH_BINS), DEPTH_BINS - 1)
        hits.setdefault((part, record["length"]), []).append(record["exact_match"])
    return [
        [
            sum(hits[part, length]) / len(hits[part, length])
            if (part, length) in hits
            else float("nan")
            for length in lengths
        ]
        for part in range(DEPTH_BINS)
    ]


def plot_tasks(records: Iterable[Record], path: Path) -> None:
    """The average score of each suite by budget, one line a method; dashed: the whole prompt."""
    by_suite: dict[str, list[Record]] = {}
    for record in records:
        by_suite.setdefault(record["suite"], []).append(record)
    size = (len(by_suite) * PANEL[0], PANEL[1])
    figure, panels = plt.subplots(
        1, len(by_suite), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, (suite, found) in zip(panels.flat, by_suite.items(), strict=True):
        by_choice = list(tasks_summary.cells(found).values())[-1]
        budgets = sorted({b for _, b in by_choice if b is not None}, key=lambda b: (b <= 1, b))
        methods = dict.fromkeys(method for method, _ in by_choice if method != FULL)
        for number, method in enumerate(methods):
            at = [budget for budget in budgets if (method, budget) in by_choice]
            scores = [by_choice[method, budget].score for budget in at]
            _line(axes, number, method, [budgets.index(budget) for budget in at], scores)
        if (FULL, None) in by_choice:
            score = by_choice[FULL, None].score.value
            axes.axhline(score, color="black", linestyle="--", linewidth=0.8)
        axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
        axes.set_xlabel("budget")
        axes.set_title(f"{suite}, average score")
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    _save(figure, path)


def _line(
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


def _budget_axis(axes: Any, budgets: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("budget, entries per layer and head")
    axes.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
