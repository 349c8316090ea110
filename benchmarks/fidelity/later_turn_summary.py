# SPDX-License-Identifier: Apache-2.0
"""What the records of `later_turn` come to: exact match by where the question is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bootstrap import Estimate, mean
from needle_summary import FULL
from results import Record
from rich.box import SIMPLE_HEAD
from rich.table import Table

INSIDE, AFTER = "inside the prompt", "after compression"
KEPT, EVICTED = "next turn, tree kept", "next turn, tree evicted"
TURNS = (INSIDE, AFTER, KEPT, EVICTED)

Place = tuple[str, str, str | None]  # form, turn, scope
Choice = tuple[str, float | None]  # method, budget


def cells(records: Iterable[Record]) -> dict[Place, dict[Choice, Estimate]]:
    """Exact match over all conversations, those that the exact cache fails included."""
    found: dict[Place, dict[Choice, list[float]]] = {}
    for record in records:
        place = record["form"], record["turn"], record["scope"]
        by_choice = found.setdefault(place, {})
        choice = record["method"], record["budget"]
        by_choice.setdefault(choice, []).append(record["exact_match"])
    return {
        place: {choice: mean(values) for choice, values in by_choice.items()}
        for place, by_choice in sorted(found.items(), key=lambda item: _order(item[0]))
    }


def _order(place: Place) -> tuple[str, int, str]:
    form, turn, scope = place
    return form, TURNS.index(turn), scope or ""


def table(records: Iterable[Record]) -> Table:
    """One row for each place of the question, one column for each choice."""
    by_place = cells(list(records))
    choices = dict.fromkeys(choice for by_choice in by_place.values() for choice in by_choice)
    shown = Table(title="Exact match", box=SIMPLE_HEAD)
    for heading in ("", "question", "scope", "n"):
        shown.add_column(heading)
    for method, budget in choices:
        shown.add_column("exact" if method == FULL else f"{method}\nb={budget:g}", justify="right")
    for (form, turn, scope), by_choice in by_place.items():
        count = max(estimate.n for estimate in by_choice.values())
        values = [by_choice.get(choice) for choice in choices]
        row = ["" if value is None else f"{value.value:.2f}" for value in values]
        shown.add_row(form, turn, scope or "", str(count), *row)
    return shown


def as_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [
        {
            "form": form,
            "turn": turn,
            "scope": scope,
            "method": method,
            "budget": budget,
            "exact_match": estimate._asdict(),
        }
        for (form, turn, scope), by_choice in cells(records).items()
        for (method, budget), estimate in by_choice.items()
    ]
