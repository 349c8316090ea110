# SPDX-License-Identifier: Apache-2.0
"""A fact told in one turn of a conversation and asked for in the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from contexts import PLACE, Cutter
from haystack import DEPTH_BINS, lead, needle, sentence_end

DOCUMENT, CHAT = "document", "chat"
TURNS = {DOCUMENT: 1, CHAT: 4}
"""User messages with text, before the one with the question."""

REQUESTS = {
    DOCUMENT: "Summarize this text in one sentence.",
    CHAT: "What do you think of this? Answer in one sentence.",
}
_REPLY = "{reply}"


class Conversation(NamedTuple):
    """What stands between the model's replies, as token ids in the model's chat format."""

    name: str  # unique, the same for the same seed
    form: str  # DOCUMENT or CHAT
    pieces: list[list[int]]  # the last one holds the question and the beginning of its answer
    single: list[int]  # the text and the question as one message: a prompt of its own
    answer: str
    answer_ids: list[int]


def conversations(
    cutter: Cutter, forms: Sequence[str], kinds: Sequence[str], lengths: Sequence[int], count: int
) -> Iterator[Conversation]:
    """`count` of every form; kinds of answers (haystack.KINDS) and lengths in turn.

    lengths: tokens of the text with its fact and question, without the model's replies.
    """
    for number in range(count):
        for form in forms:
            kind = kinds[number % len(kinds)]
            length = lengths[number // len(kinds) % len(lengths)]
            yield _conversation(cutter, form, kind, length, number)


def _conversation(cutter: Cutter, form: str, kind: str, length: int, number: int) -> Conversation:
    source = needle(cutter, kind, length, number % DEPTH_BINS, number, distractors=0)
    before, _ = cutter.around(PLACE)
    text = source.tokens[len(before) : source.question_start]
    turns = TURNS[form]
    # Between sentences: a fact is in one turn.
    cuts = [sentence_end(cutter, text, len(text) * turn // turns) for turn in range(1, turns)]
    parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    around = _around(cutter, form, source.key)
    pieces = [around[2 * i] + part + around[2 * i + 1] for i, part in enumerate(parts)]
    pieces.append(around[-1] + cutter.encode(lead(source.key)))
    return Conversation(
        name=f"{form}/{source.name}",
        form=form,
        pieces=pieces,
        single=source.tokens[: source.answer_start],
        answer=source.answer,
        answer_ids=source.tokens[source.answer_start :],
    )


def _around(cutter: Cutter, form: str, key: str) -> list[list[int]]:
    """Token ids before the first text, after it, before the next, ..., after the last reply."""
    messages = []
    for _ in range(TURNS[form]):
        messages.append({"role": "user", "content": f"{PLACE}\n\n{REQUESTS[form]}"})
        messages.append({"role": "assistant", "content": _REPLY})
    messages.append({"role": "user", "content": f"What is the secret code of {key}?"})
    chat = cutter.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return [cutter.encode(part) for part in chat.replace(_REPLY, PLACE).split(PLACE)]
