# SPDX-License-Identifier: Apache-2.0
"""What the records of `tasks` come to: scores by task, their averages, differences to the whole
prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bootstrap import Estimate, mean_of_means
from needle_summary import FULL
from results import Record
from rich.box import SIMPLE_HEAD
from rich.table import Table

AVERAGE = "average"

Choice = tuple[str, float | None]  # method, budget


class Cell(NamedTuple):
    """One choice on one task, 0 to 100."""

    score: Estimate
    difference: Estimate | None  # to the whole prompt, the same samples; None without any
    compressed: int  # prompts; the others were too short for it


def cells(records: Iterable[Record]) -> dict[str, dict[Choice, Cell]]:
    """task -> choice -> cell, tasks by name; the last one is their AVERAGE.

    In it every task counts the same, over the choices that have all of them.
    """
    found: dict[str, dict[Choice, dict[str, Record]]] = {}
    for record in records:
        choice = record["method"], record["budget"]
        by_choice = found.setdefault(record["task"], {})
        by_choice.setdefault(choice, {})[record["sample"]] = record
    shown = {
        task: {
            choice: _cell([(kept, by_choice.get((FULL, None), {}))])
            for choice, kept in by_choice.items()
        }
        for task, by_choice in sorted(found.items())
    }
    if len(found) > 1:
        choices = dict.fromkeys(choice for by_choice in found.values() for choice in by_choice)
        shown[AVERAGE] = {
            choice: _cell([(task[choice], task.get((FULL, None), {})) for task in found.values()])
            for choice in choices
            if all(choice in task for task in found.values())
        }
    return shown


def _cell(tasks: list[tuple[dict[str, Record], dict[str, Record]]]) -> Cell:
    """tasks: sample -> record of the choice and of the whole prompt, one pair for each task."""
    scores = [[100 * record["score"] for record in kept.values()] for kept, _ in tasks]
    differences = [
        [100 * (kept[sample]["score"] - full[sample]["score"]) for sample in kept if sample in full]
        for kept, full in tasks
    ]
    return Cell(
        mean_of_means(scores),
        mean_of_means(differences) if all(differences) else None,
        sum(record["compressed"] for kept, _ in tasks for record in kept.values()),
    )


def tables(records: Iterable[Record]) -> Iterator[Table]:
    """Scores, then differences with their intervals: a row for each task, a column a choice."""
    by_task = cells(list(records))
    choices = dict.fromkeys(choice for by_choice in by_task.values() for choice in by_choice)
    scores = _table("Score, 0 to 100", choices)
    differences = _table("Difference to the whole prompt, 95% interval", choices, whole=False)
    for task, by_choice in by_task.items():
        count = max(cell.score.n for cell in by_choice.values())
        if task == AVERAGE:
            scores.add_section()
            differences.add_section()
        scores.add_row(task, str(count), *(_score(by_choice.get(choice)) for choice in choices))
        others = [choice for choice in choices if choice[0] != FULL]
        differences.add_row(
            task, str(count), *(_difference(by_choice.get(choice)) for choice in others)
        )
    yield scores
    if len(choices) > 1:
        yield differences


def _table(title: str, choices: Iterable[Choice], whole: bool = True) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("n", justify="right")
    for method, budget in choices:
        if method != FULL or whole:
            table.add_column(
                method if budget is None else f"{method}\nb={budget:g}", justify="right"
            )
    return table


def _score(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.score.value:.1f}"


def _difference(cell: Cell | None) -> str:
    """With the number of prompts that were too short to compress, if there are any."""
    if cell is None or cell.difference is None:
        return ""
    value, low, high, _ = cell.difference
    exact = cell.score.n - cell.compressed
    kept = f"\n{exact} exact" if exact else ""
    return f"{value:+.1f}\n{low:+.1f}..{high:+.1f}{kept}"


def as_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One object for each task and choice."""
    return [
        {"task": task, "method": method, "budget": budget, **_plain(cell)}
        for task, by_choice in cells(records).items()
        for (method, budget), cell in by_choice.items()
    ]


def _plain(cell: Cell) -> Mapping[str, Any]:
    difference = cell.difference
    return {
        "score": cell.score._asdict(),
        "difference": None if difference is None else difference._asdict(),
        "compressed": cell.compressed,
    }
