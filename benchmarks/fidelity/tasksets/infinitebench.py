# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's retrieval tasks, by their published recipes or read from a folder.

The messages are those it sends to GPT-4, the reply begins as it does for YaRN-Mistral.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from tasksets import metrics
from tasksets.recipe import Recipe
from tasksets.ruler_needles import NOISE, made_up_uuid
from tasksets.sample import Metric, Sample

SUITE = "infinitebench"
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"


class Form(NamedTuple):
    message: str  # before the context
    reply_start: str
    max_new_tokens: int
    metric: Metric


FORMS = {
    "passkey": Form(
        f"{_HIDDEN} and memorize them. I will quiz you about the important information there.",
        "The pass key is",
        6,
        metrics.first_number,
    ),
    "number_string": Form(
        f"{_HIDDEN}. I will quiz you about the important information there.",
        "The sequence of digits is",
        12,
        metrics.first_number,
    ),
    "kv_retrieval": Form(
        "Extract the value corresponding to the specified key in the JSON object below.",
        "",
        50,
        metrics.word,
    ),
}


def rows(task: str, folder: Path | None, count: int) -> Iterator[Sample]:
    """The first `count` rows of TASK.jsonl anywhere in the folder; none if it is not there."""
    paths = sorted(folder.rglob(f"{task}.jsonl")) if folder is not None else []
    for path in paths[:1]:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")[:count]:
            row = json.loads(line)
            answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
            yield _sample(task, f"row {row['id']}", row["context"], row["input"], answers)


def recipe(task: str, name: str) -> Recipe:
    """The sample's; the filler is lines of noise, or pairs of a key and a value."""
    return {"passkey": _passkey, "number_string": _number_string, "kv_retrieval": _pairs}[task](
        name
    )


def _passkey(name: str) -> Recipe:
    def make(random: Random, amount: int) -> Sample:
        key = "".join(random.choices("0123456789", k=5))
        return _hidden("passkey", name, "pass key", key, random, amount)

    return make


def _number_string(name: str) -> Recipe:
    def make(random: Random, amount: int) -> Sample:
        digits = random.choices("0123456789", k=5)
        for _ in range(5):  # a digit twice: hard to copy
            place = random.randrange(len(digits))
            digits.insert(place, digits[place])
        return _hidden("number_string", name, "sequence of digits", "".join(digits), random, amount)

    return make


def _pairs(name: str) -> Recipe:
    def make(random: Random, amount: int) -> Sample:
        place = random.random()
        pairs = {made_up_uuid(random): made_up_uuid(random) for _ in range(amount)}
        key = list(pairs)[int(place * amount)]
        context = f"JSON data:\n{json.dumps(pairs)}"
        question = f'Key: "{key}"\nThe value associated with the specified key is: '
        return _sample("kv_retrieval", name, context, question, [pairs[key]])

    return make


def _hidden(task: str, name: str, what: str, value: str, random: Random, amount: int) -> Sample:
    """The value, and what it is, in so many lines of noise."""
    fact = f"The {what} is {value}. Remember it. {value} is the {what}."
    before = int(random.random() * (amount + 1))
    context = "\n".join([NOISE] * before + [fact] + [NOISE] * (amount - before))
    return _sample(task, name, context, f"What is the {what}?", [value])


def _sample(task: str, name: str, context: str, question: str, answers: list[str]) -> Sample:
    form = FORMS[task]
    return Sample(
        name=name,
        task=task,
        suite=SUITE,
        prompt=f"{form.message}\n\n{context}\n\n{question}",
        answers=tuple(answers),
        max_new_tokens=form.max_new_tokens,
        metric=form.metric,
        reply_start=form.reply_start,
    )
