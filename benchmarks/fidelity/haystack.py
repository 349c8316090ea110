# SPDX-License-Identifier: Apache-2.0
"""A made-up fact in real text and a question about it: the needle and its haystack."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.fidelity.contexts import PLACE, Cutter

KINDS = ("digits3", "digits5", "digits10", "phrase")
PHRASE_WORDS = 6
DEPTH_BINS = 5

_KEYS = (
    *("Lisbon", "Oslo", "Vienna", "Cairo", "Dublin", "Athens", "Lima", "Prague", "Warsaw"),
    *("Geneva", "Naples", "Seville", "Tunis", "Boston", "Madrid", "Berlin", "Quito", "Havana"),
)
_WORDS = (
    *("apple", "river", "stone", "candle", "silver", "garden", "winter", "paper", "violin"),
    *("copper", "island", "button", "yellow", "basket", "tiger", "mirror", "engine", "pepper"),
    *("ladder", "purple", "kitchen", "rocket", "forest", "blanket", "marble", "whistle", "ocean"),
    *("hammer", "cotton", "lantern", "saddle", "bridge", "cherry", "wagon", "feather", "tunnel"),
)


class Needle(NamedTuple):
    """One fact and the question about it. `tokens` ends with the answer; what stands before it is
    text, question, and the beginning of the reply."""

    name: str  # unique, the same for the same seed
    kind: str
    tokens: list[int]
    question_start: int  # first token after the text
    answer_start: int  # first token of the answer
    key: str  # what the fact is about
    answer: str
    depth: float  # share of the text that stands before the needle
    length: int  # tokens before the answer
    distractors: int

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - self.answer_start


def needles(
    cutter: Cutter, kinds: Sequence[str], lengths: Sequence[int], count: int, distractors: int
) -> Iterator[Needle]:
    """`count` of every kind: lengths in turn, and for each of them the parts of the text in turn.

    lengths: tokens before the answer. distractors: facts of the same form about other keys.
    """
    for number in range(count):
        for kind in kinds:
            length = lengths[number % len(lengths)]
            part = number // len(lengths) % DEPTH_BINS
            yield needle(cutter, kind, length, part, number, distractors)


def needle(
    cutter: Cutter, kind: str, length: int, part: int, number: int, distractors: int
) -> Needle:
    """Needle `number` of its kind, somewhere in `part` of DEPTH_BINS parts of the text."""
    choice = random.Random(f"{cutter.seed}/{kind}/{number}/{distractors}")
    keys = choice.sample(_KEYS, distractors + 1)
    answers = [_answer(kind, choice) for _ in keys]
    facts = [
        cutter.encode(f" {lead(key)} {answer}.") for key, answer in zip(keys, answers, strict=True)
    ]
    before, after = cutter.around(f"{PLACE}\n\nWhat is the secret code of {keys[0]}?")
    question = after + cutter.encode(lead(keys[0]))
    size = length - len(before) - len(question) - sum(len(fact) for fact in facts)
    title, start, text = cutter.passage(number, size)
    depths = [(part + choice.random()) / DEPTH_BINS]
    depths += [choice.random() for _ in range(distractors)]
    places = [sentence_end(cutter, text, round(depth * size)) for depth in depths]
    # From the last place to the first, so that an insertion moves no other.
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        text = text[:place] + fact + text[place:]
    answer_ids = cutter.encode(f" {answers[0]}")
    if len(answer_ids) < 2:
        raise ValueError(f"{kind}: the model's tokenizer makes one token of it, needs 2 or more")
    return Needle(
        name=f"{kind}/{number}/{title}@{start}+{length}/{distractors}",
        kind=kind,
        tokens=before + text + question + answer_ids,
        question_start=len(before) + len(text),
        answer_start=length,
        key=keys[0],
        answer=answers[0],
        depth=places[0] / size,
        length=length,
        distractors=distractors,
    )


def lead(key: str) -> str:
    """How the fact begins, and the reply."""
    return f"The secret code of {key}:"


def _answer(kind: str, choice: random.Random) -> str:
    if kind == "phrase":
        return " ".join(choice.sample(_WORDS, PHRASE_WORDS))
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: accepts {', '.join(KINDS)}")
    return "".join(choice.choice("0123456789") for _ in range(int(kind.removeprefix("digits"))))


def sentence_end(cutter: Cutter, text: Sequence[int], wanted: int) -> int:
    """The place nearest to `wanted` that follows a sentence, or `wanted` if none is near."""
    for distance in range(64):
        for place in (wanted - distance, wanted + distance):
            if 0 < place <= len(text):
                piece: str = cutter.tokenizer.decode([text[place - 1]])
                if piece.rstrip().endswith((".", "!", "?")):
                    return place
    return wanted
