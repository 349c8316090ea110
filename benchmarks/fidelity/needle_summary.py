# SPDX-License-Identifier: Apache-2.0
"""What the records of `needle` come to: exact match and likelihood by kind, method and budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bootstrap import Estimate, mean
from results import Record
from rich.box import SIMPLE_HEAD
from rich.table import Table

FULL = "full"
"""The method name of a needle's record for the whole prompt, exact."""

INSIDE, AFTER = "inside", "after"
"""Where the question stands: in the compressed prompt's window, or after the compression."""


class Group(NamedTuple):
    """Needles that are averaged together."""

    question: str
    distractors: int
    kind: str


class Cell(NamedTuple):
    exact_match: Estimate
    nll: Estimate | None  # None through a server


def answerable(records: Iterable[Record]) -> list[Record]:
    """The records of needles that the model finds with the whole prompt, the full ones included."""
    kept = list(records)
    found = {
        (record["needle"], record["question"])
        for record in kept
        if record["method"] == FULL and record["exact_match"] == 1
    }
    return [record for record in kept if (record["needle"], record["question"]) in found]


def cells(records: Iterable[Record]) -> dict[Group, dict[tuple[str, float | None], Cell]]:
    """group -> (method, budget) -> cell, over the answerable needles."""
    found: dict[Group, dict[tuple[str, float | None], list[Record]]] = {}
    for record in answerable(records):
        group = Group(record["question"], record["distractors"], record["kind"])
        by_choice = found.setdefault(group, {})
        by_choice.setdefault((record["method"], record["budget"]), []).append(record)
    return {
        group: {choice: _cell(kept) for choice, kept in by_choice.items()}
        for group, by_choice in found.items()
    }


def _cell(records: Sequence[Record]) -> Cell:
    likelihoods = [record["nll"] for record in records if record["nll"] is not None]
    return Cell(
        mean([record["exact_match"] for record in records]),
        mean(likelihoods) if likelihoods else None,
    )


def tables(records: Iterable[Record]) -> Iterator[Table]:
    """Exact match and NLL, methods by budgets, one table for each question, distractors, kind."""
    kept = list(records)
    asked = _asked(kept)
    for group, by_choice in cells(kept).items():
        found = by_choice[FULL, None]
        title = f"{group.kind}, question {group.question}"
        if group.distractors:
            title += f", {group.distractors} distractors"
        title += f": exact match / NLL, {found.exact_match.n} of {asked[group]} found in full"
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("method")
        found_budgets = {budget for _, budget in by_choice if budget is not None}
        budgets = sorted(found_budgets, key=lambda budget: (budget <= 1, budget))
        for budget in budgets:
            table.add_column(f"b={budget:g}", justify="right")
        for method in dict.fromkeys(method for method, _ in by_choice if method != FULL):
            table.add_row(method, *(_shown(by_choice.get((method, b))) for b in budgets))
        yield table


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    shown = f"{cell.exact_match.value:.2f}"
    return shown if cell.nll is None else f"{shown} / {cell.nll.value:.2f}"


def _asked(records: Iterable[Record]) -> dict[Group, int]:
    """Needles of each group, found in full or not."""
    needles: dict[Group, set[str]] = {}
    for record in records:
        group = Group(record["question"], record["distractors"], record["kind"])
        needles.setdefault(group, set()).add(record["needle"])
    return {group: len(names) for group, names in needles.items()}


def as_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One object for each group, method and budget."""
    kept = list(records)
    asked = _asked(kept)
    return [
        {
            **group._asdict(),
            "asked": asked[group],
            "method": method,
            "budget": budget,
            "exact_match": cell.exact_match._asdict(),
            "nll": None if cell.nll is None else cell.nll._asdict(),
        }
        for group, by_choice in cells(kept).items()
        for (method, budget), cell in by_choice.items()
    ]
