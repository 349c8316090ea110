# SPDX-License-Identifier: Apache-2.0
"""RULER's needles in a haystack: one or several keys, values and questions (NVIDIA/RULER)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random
from typing import NamedTuple
from uuid import UUID

from tasksets.metrics import all_in_text
from tasksets.recipe import Recipe, inserted
from tasksets.sample import Sample
from tasksets.words import words

SUITE = "ruler"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = "One of the special magic {kind} for {key} is: {value}."
MAX_NEW_TOKENS = 128


class Form(NamedTuple):
    """What is hidden, and in what."""

    haystack: str  # "noise", "text", or "facts" of the same form about other keys
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1  # of each key
    asked: int = 1  # keys


FORMS = {
    "niah_single_1": Form("noise"),
    "niah_single_2": Form("text"),
    "niah_single_3": Form("text", value_kind="uuids"),
    "niah_multikey_1": Form("text", keys=4),
    "niah_multikey_2": Form("facts"),
    "niah_multikey_3": Form("facts", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Form("text", values=4),
    "niah_multiquery": Form("text", keys=4, asked=4),
}


def recipe(task: str, name: str, books: Mapping[str, str]) -> Recipe:
    """The sample's; the filler is sentences. books: title -> text, for the haystack "text"."""
    form = FORMS[task]

    def make(random: Random, amount: int) -> Sample:
        # What is asked comes first: it does not depend on the amount.
        keys = [_made_up(form.key_kind, random) for _ in range(form.keys)]
        values = [[_made_up(form.value_kind, random) for _ in range(form.values)] for _ in keys]
        facts = [
            FACT.format(kind=form.value_kind, key=key, value=value)
            for key, of_key in zip(keys, values, strict=True)
            for value in of_key
        ]
        asked = random.sample(range(len(keys)), form.asked)
        depths = [random.random() for _ in facts]
        filler = _filler(form, books, random, amount)
        places = [round(depth * amount) for depth in depths]
        separator = " " if form.haystack == "text" else "\n"
        context = separator.join(inserted(filler, facts, places))
        answers = tuple(value for number in asked for value in values[number])
        prompt, reply_start = _asked(form, context, [keys[number] for number in asked])
        return Sample(
            name, task, SUITE, prompt, answers, MAX_NEW_TOKENS, all_in_text, reply_start=reply_start
        )

    return make


def _asked(form: Form, context: str, keys: Sequence[str]) -> tuple[str, str]:
    """The message, and the beginning of the reply."""
    one = form.asked * form.values == 1
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    kind = form.value_kind[:-1] if one else form.value_kind
    some, are_all, are = ("A", "is", "is") if one else ("Some", "are all", "are")
    prompt = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
    )
    start = f"The special magic {kind} for {query} mentioned in the provided text {are}"
    return prompt, start


def _filler(form: Form, books: Mapping[str, str], random: Random, amount: int) -> list[str]:
    """`amount` sentences, or lines of noise or facts."""
    if form.haystack == "noise":
        return [NOISE] * amount
    if form.haystack == "facts":
        return [
            FACT.format(
                kind=form.value_kind,
                key=_made_up(form.key_kind, random),
                value=_made_up(form.value_kind, random),
            )
            for _ in range(amount)
        ]
    text = sentences(books[random.choice(sorted(books))])
    start = random.randrange(len(text))
    return [text[(start + number) % len(text)] for number in range(amount)]


@cache
def sentences(text: str) -> list[str]:
    """Its sentences, white space as single blanks."""
    return re.split(r"(?<=[.!?]) ", " ".join(text.split()))


def made_up_uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


def _made_up(kind: str, random: Random) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return made_up_uuid(random)
    return f"{random.choice(words('adjective'))}-{random.choice(words('noun'))}"
