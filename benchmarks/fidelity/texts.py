# SPDX-License-Identifier: Apache-2.0
"""Where real text comes from: a folder, the Hugging Face hub, or Python's own reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lava_sglang.tools.demo.passages import PassageError, python_topics

PG19 = "emozilla/pg19"  # deepmind/pg19 as Parquet, which needs no loading script
LONGBENCH = "Xnhyacinth/LongBench"  # THUDM/LongBench as Parquet
LONGBENCH_TASKS = ("qasper", "multifieldqa_en", "hotpotqa", "triviaqa", "trec", "lcc")


class Row(NamedTuple):
    """One LongBench example."""

    task: str
    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()  # of a classification


class Texts(NamedTuple):
    books: dict[str, str]  # title -> text
    rows: list[Row]


def load_texts(source: str | None) -> Texts:
    """Texts of `source`: a folder, "hub", or None for the chapters of Python's reference.

    A folder is searched at any depth for .txt files, books, and .jsonl files, LongBench tasks.
    Raises PassageError if it holds neither.
    """
    if source is None:
        return Texts(python_topics(), [])
    if source == "hub":
        return _from_hub(LONGBENCH_TASKS)
    return _from_folder(Path(source))


@cache
def load_books(source: str | None) -> dict[str, str]:
    """Title -> text of `source`; Python's reference if it is a folder without .txt files."""
    if source == "hub":
        return _books_of_the_hub()
    return (_books(Path(source)) if source is not None else {}) or python_topics()


def load_rows(source: str | None, task: str) -> list[Row]:
    """The rows of one LongBench task, from TASK.jsonl anywhere in a folder, or from the hub.

    Raises PassageError if `source` is None or the folder has no such file.
    """
    if source == "hub":
        return _rows_of_the_hub(task)
    paths = sorted(Path(source).rglob(f"{task}.jsonl")) if source is not None else []
    if not paths:
        raise PassageError(
            f"--data={source}: {task} accepts a folder with {task}.jsonl in it, or 'hub'"
        )
    return _rows(paths[0])


def _from_folder(folder: Path) -> Texts:
    books = _books(folder)
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in _rows(path)]
    if not books and not rows:
        raise PassageError(f"{folder}: holds no .txt file and no .jsonl file")
    return Texts(books, rows)


def _books(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))}


def _rows(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_row(json.loads(line), path.stem) for line in lines if line.strip()]


def _from_hub(tasks: Sequence[str]) -> Texts:
    return Texts(_books_of_the_hub(), [row for task in tasks for row in _rows_of_the_hub(task)])


def _books_of_the_hub() -> dict[str, str]:
    from datasets import load_dataset

    return {
        book["short_book_title"]: book["text"]
        for book in load_dataset(PG19, split="test", streaming=True)
    }


def _rows_of_the_hub(task: str) -> list[Row]:
    from datasets import load_dataset

    return [_row(row, task) for row in load_dataset(LONGBENCH, task, split="test")]


def _row(row: dict[str, Any], task: str) -> Row:
    return Row(
        task,
        str(row["_id"]),
        row["context"],
        row["input"],
        tuple(row["answers"]),
        tuple(row.get("all_classes") or ()),
    )
