# SPDX-License-Identifier: Apache-2.0
"""What the records of `divergence` come to: means and ratios by budget and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from bootstrap import Estimate, geometric_ratio, mean
from results import Record
from rich.box import SIMPLE_HEAD
from rich.table import Table

FULL = "full"
"""The method name of a context's record for the whole prompt, exact."""

GROUPS = ("all", "book", "longbench")


class Cell(NamedTuple):
    """One method at one budget over the contexts of a group."""

    kl: Estimate
    top1: Estimate
    nll_change: Estimate
    ratio: Estimate | None  # of KL to the reference method's, paired; None without it


def cells(
    records: Iterable[Record], reference: str, group: str = "all"
) -> dict[float, dict[str, Cell]]:
    """budget -> method -> cell, in the order of the records.

    A prompt that the budget covers says nothing of a method: its records are left out, but for
    those of budget 1, which show the noise.
    """
    found: dict[float, dict[str, dict[str, Record]]] = {}
    for record in records:
        covered = record["kept_tokens"] >= record["prompt_tokens"] and record["budget"] != 1
        if record["method"] != FULL and not covered and _belongs(record, group):
            by_method = found.setdefault(record["budget"], {})
            by_method.setdefault(record["method"], {})[record["context"]] = record
    return {
        budget: {
            method: _cell(by_context, by_method.get(reference, {}))
            for method, by_context in by_method.items()
        }
        for budget, by_method in sorted(found.items(), key=lambda item: (item[0] <= 1, item[0]))
    }


def _belongs(record: Record, group: str) -> bool:
    return group == "all" or (record["source"] == "book") == (group == "book")


def _cell(by_context: dict[str, Record], reference: dict[str, Record]) -> Cell:
    common = [context for context in by_context if context in reference]
    ratio = None
    if common:
        ratio = geometric_ratio(
            [by_context[context]["kl"] for context in common],
            [reference[context]["kl"] for context in common],
        )
    records = by_context.values()
    kl, top1, nll_change = (
        mean([record[field] for record in records]) for field in ("kl", "top1", "nll_change")
    )
    return Cell(kl, top1, nll_change, ratio)


def tables(records: Iterable[Record], reference: str) -> Iterator[Table]:
    """One table per statistic, methods by budgets; intervals on the second line of a cell."""
    by_budget = cells(list(records), reference)
    methods = dict.fromkeys(method for by_method in by_budget.values() for method in by_method)
    headings = {
        "kl": "KL(full || compressed), nats per token",
        "ratio": f"KL, geometric ratio to {reference}'s",
        "top1": "Share of tokens with the same argmax",
        "nll_change": "Change in NLL, nats per token",
    }
    for field, title in headings.items():
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("method")
        for budget, by_method in by_budget.items():
            contexts = max(cell.kl.n for cell in by_method.values())
            table.add_column(f"b={budget:g}\nn={contexts}", justify="right")
        for method in methods:
            row = [by_method.get(method) for by_method in by_budget.values()]
            table.add_row(method, *(_shown(cell and getattr(cell, field)) for cell in row))
        yield table


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f}\n{estimate.low:.2f}..{estimate.high:.2f}"


def as_json(records: Iterable[Record], reference: str) -> dict[str, Any]:
    """The cells of every group, and the CPU seconds of a context."""
    kept = list(records)
    contexts = {record["context"] for record in kept}
    seconds = sum(record["cpu_seconds"] for record in kept)
    return {
        "reference": reference,
        "contexts": len(contexts),
        "cpu_seconds_per_context": seconds / max(len(contexts), 1),
        "groups": {
            group: {
                f"{budget:g}": {method: _plain(cell) for method, cell in by_method.items()}
                for budget, by_method in cells(kept, reference, group).items()
            }
            for group in GROUPS
        },
    }


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        name: None if estimate is None else estimate._asdict()
        for name, estimate in cell._asdict().items()
    }
