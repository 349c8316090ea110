# SPDX-License-Identifier: Apache-2.0
"""Where real text comes from: a folder, the Hugging Face hub, or Python's own reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lava_sglang.demo.passages import PassageError, python_topics

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


def _from_folder(folder: Path) -> Texts:
    books = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))}
    rows = [
        _row(json.loads(line), path.stem)
        for path in sorted(folder.rglob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if not books and not rows:
        raise PassageError(f"{folder}: holds no .txt file and no .jsonl file")
    return Texts(books, rows)


def _from_hub(tasks: Sequence[str]) -> Texts:
    from datasets import load_dataset

    books = {
        book["short_book_title"]: book["text"]
        for book in load_dataset(PG19, split="test", streaming=True)
    }
    rows = [
        _row(row, task) for task in tasks for row in load_dataset(LONGBENCH, task, split="test")
    ]
    return Texts(books, rows)


def _row(row: dict[str, Any], task: str) -> Row:
    return Row(task, str(row["_id"]), row["context"], row["input"], tuple(row["answers"]))
