# SPDX-License-Identifier: Apache-2.0
"""Prompts of a chosen length cut from real texts, and what comes after them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from texts import Row, Texts

from lava_sglang.tools.demo.passages import PassageError

PLACE = "{text}"

# Tasks that LongBench itself asks without a chat template: few-shot lists and code.
RAW_TASKS = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
QUESTION = "Answer in several sentences, with all details that the text gives."
SUMMARY = "Summarize the text in several sentences, with its details."


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
