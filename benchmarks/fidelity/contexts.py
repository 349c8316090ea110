# SPDX-License-Identifier: Apache-2.0
"""Prompts of a chosen length cut from real texts, and what comes after them.

The text is a folder's, the Hugging Face hub's, or Python's own reference.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lava_sglang.tools.passages import PassageError, python_topics

PG19 = "emozilla/pg19"  # deepmind/pg19 as Parquet, which needs no loading script
LONGBENCH = "Xnhyacinth/LongBench"  # THUDM/LongBench as Parquet
LONGBENCH_TASKS = ("qasper", "multifieldqa_en", "hotpotqa", "triviaqa", "trec", "lcc")
# Tasks that LongBench itself asks without a chat template: few-shot lists and code.
RAW_TASKS = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")

PLACE = "{text}"
QUESTION = "Answer in several sentences, with all details that the text gives."
SUMMARY = "Summarize the text in several sentences, with its details."


class Row(NamedTuple):
    """One LongBench example."""

    task: str
    id: str
    context: str
    question: str


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
        return _from_hub()
    return _from_folder(Path(source))


def _from_folder(folder: Path) -> Texts:
    texts = sorted(folder.rglob("*.txt"))
    books = {path.stem: path.read_text(encoding="utf-8") for path in texts}
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in _rows(path)]
    if not books and not rows:
        raise PassageError(f"{folder}: holds no .txt file and no .jsonl file")
    return Texts(books, rows)


def _rows(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_row(json.loads(line), path.stem) for line in lines if line.strip()]


def _from_hub() -> Texts:
    from datasets import load_dataset

    books = {
        book["short_book_title"]: book["text"]
        for book in load_dataset(PG19, split="test", streaming=True)
    }
    rows = [
        _row(row, task)
        for task in LONGBENCH_TASKS
        for row in load_dataset(LONGBENCH, task, split="test")
    ]
    return Texts(books, rows)


def _row(row: dict[str, Any], task: str) -> Row:
    return Row(task, str(row["_id"]), row["context"], row["input"])


class Context(NamedTuple):
    """A prompt of real text. `continuation` is what its author wrote next; None if the model's own
    answer is to be the continuation."""

    name: str  # unique, the same for the same seed
    source: str  # "book", or the LongBench task
    prompt: list[int]
    continuation: list[int] | None


class Cutter:
    """Cuts contexts from texts with a model's tokenizer (of transformers); a book is encoded once.

    All choices depend on `seed` and the context's number only.
    """

    def __init__(self, tokenizer: Any, texts: Texts, seed: int = 0):
        self.tokenizer = tokenizer
        self.texts = texts
        self.seed = seed
        self._books: dict[str, list[int]] = {}

    def contexts(self, count: int, lengths: Sequence[int], new_tokens: int) -> list[Context]:
        """The first `count` contexts, books and LongBench rows in turn, lengths in turn.

        lengths: prompt tokens. Raises PassageError if the texts hold fewer.
        """
        both = zip_longest(
            self.book_contexts(lengths, new_tokens, count), self.row_contexts(lengths)
        )
        found: dict[str, Context] = {}
        for context in chain.from_iterable(both):
            if context is not None:
                found.setdefault(context.name, context)
            if len(found) == count:
                return list(found.values())
        raise PassageError(
            f"--contexts={count}: accepts up to {len(found)}, which is how many the texts hold"
        )

    def book_contexts(
        self, lengths: Sequence[int], new_tokens: int, most: int
    ) -> Iterator[Context]:
        """Passages of any books, with the tokens that follow them."""
        for number in range(most if self.texts.books else 0):
            length = lengths[number % len(lengths)]
            title, start, passage = self.passage(number, length + new_tokens - len(self.before))
            cut = length - len(self.before)
            yield Context(
                f"{title}@{start}+{length}",
                "book",
                self.before + passage[:cut],
                passage[cut:],
            )

    def passage(self, number: int, size: int) -> tuple[str, int, list[int]]:
        """Title, first token and `size` tokens of any book that is long enough."""
        books = [title for title in self.texts.books if len(self.book(title)) >= size]
        if not books:
            longest = max((len(self.book(title)) for title in self.texts.books), default=0)
            raise PassageError(f"a passage of {size} tokens: the longest text has {longest}")
        choice = self.random(number)
        title = choice.choice(books)
        start = choice.randrange(len(self.book(title)) - size + 1)
        return title, start, self.book(title)[start : start + size]

    def row_contexts(self, lengths: Sequence[int]) -> Iterator[Context]:
        """LongBench rows, tasks in turn, their middle left out to fit; rows too short are passed
        over."""
        by_task: dict[str, list[Row]] = {}
        for row in self.texts.rows:
            by_task.setdefault(row.task, []).append(row)
        for rows in by_task.values():
            self.random(0).shuffle(rows)
        turns = chain.from_iterable(zip_longest(*by_task.values()))
        number = 0
        for row in turns:
            if row is None:
                continue
            length = lengths[number % len(lengths)]
            prompt = self.ask(row, length)
            if prompt is not None:
                number += 1
                yield Context(f"{row.task}/{row.id}+{length}", row.task, prompt, None)

    def ask(self, row: Row, length: int) -> list[int] | None:
        """The row's prompt in `length` tokens, or None if its text is shorter."""
        if row.task in RAW_TASKS:
            before, after = self.before, self.encode("\n" + row.question if row.question else "")
        else:
            request = f"{row.question}\n{QUESTION}" if row.question else SUMMARY
            before, after = self.around(f"{PLACE}\n\n{request}")
        text = self.encode(row.context)
        size = length - len(before) - len(after)
        if not 0 < size <= len(text):
            return None
        head = size // 2
        return before + text[:head] + text[len(text) - (size - head) :] + after

    def around(self, content: str) -> tuple[list[int], list[int]]:
        """Token ids before and after PLACE of a user's message, in the model's chat format."""
        if self.tokenizer.chat_template:
            message = {"role": "user", "content": content}
            content = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            before, after = content.split(PLACE)
            return self.encode(before), self.encode(after)
        before, after = content.split(PLACE)
        return self.before + self.encode(before), self.encode(after + "\n")

    @property
    def before(self) -> list[int]:
        """What the model expects before any text: its begin-of-text token, where it has one."""
        first: list[int] = self.tokenizer.encode("")
        return first

    def book(self, title: str) -> list[int]:
        if title not in self._books:
            self._books[title] = self.encode(self.texts.books[title])
        return self._books[title]

    def encode(self, text: str) -> list[int]:
        # Not verbose: a whole book is longer than the model's context, which a prompt is not.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def random(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{number}")
