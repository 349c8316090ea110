# SPDX-License-Identifier: Apache-2.0
"""RULER's common words of a list and frequent words of a coded text (NVIDIA/RULER)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from random import Random
from string import ascii_lowercase

from tasksets.metrics import all_in_text
from tasksets.recipe import Recipe
from tasksets.ruler_needles import SUITE
from tasksets.sample import Sample
from tasksets.words import words

COMMON, FREQUENT = "cwe", "fwe"
COMMON_WORDS = 10
FREQUENT_WORDS = 3
SHORT = 4096
"""Below so many tokens common words are repeated less often, as RULER does."""

_COMMON_START = " Answer: The top 10 words that appear most often in the list are:"
_FREQUENT_START = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


def common_recipe(name: str, length: int) -> Recipe:
    """The sample's, of `length` tokens; the filler is words that are not common."""
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    example = (10, 3, 1) if length < SHORT else (30, 10, 3)

    def make(random: Random, amount: int) -> Sample:
        solved, answers = _word_list(random, *example)
        numbered = " ".join(_numbered(answers))
        solved += f"{_COMMON_START} {numbered}\n"
        prompt, answers = _word_list(random, amount, often, seldom)
        return Sample(
            name,
            COMMON,
            SUITE,
            solved + prompt,
            tuple(answers),
            120,
            all_in_text,
            reply_start=_COMMON_START.strip(),
        )

    return make


def _word_list(random: Random, others: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """The message, and its common words: each `often` times, `others` other words `seldom`."""
    drawn = random.sample(_known(COMMON_WORDS + others), COMMON_WORDS + others)
    common = drawn[:COMMON_WORDS]
    listed = common * often + drawn[COMMON_WORDS:] * seldom
    random.shuffle(listed)
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{' '.join(_numbered(listed))}\n"
        "Question: What are the 10 most common words in the above list?"
    )
    return prompt, common


def _known(least: int) -> list[str]:
    """Words, at least so many: where a list needs more, with numbers, which are other words."""
    known = _all_words()
    rounds = -(-least // len(known))
    return known + [f"{word}{number}" for number in range(2, rounds + 1) for word in known]


@cache
def _all_words() -> list[str]:
    return sorted({*words("noun"), *words("adjective"), *words("verb")})


def _numbered(listed: Sequence[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(listed, 1)]


def frequent_recipe(name: str, length: int) -> Recipe:
    """The sample's, of `length` tokens; the filler is words, drawn by a zeta law of exponent 2."""
    vocabulary = max(length // 50, 2 * FREQUENT_WORDS)

    def make(random: Random, amount: int) -> Sample:
        coded = ["".join(random.choices(ascii_lowercase, k=6)) for _ in range(vocabulary)]
        coded[0] = "..."  # the most frequent is noise
        # At least four of the third: it is more frequent than the next at any amount.
        total = (amount + 100) / (math.pi**2 / 6)
        text = [word for rank, word in enumerate(coded, 1) for _ in range(int(total / rank**2))]
        random.shuffle(text)
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(text)}\nQuestion: Do not "
            "provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )
        return Sample(
            name,
            FREQUENT,
            SUITE,
            prompt,
            tuple(coded[1 : 1 + FREQUENT_WORDS]),
            50,
            all_in_text,
            reply_start=_FREQUENT_START.strip(),
        )

    return make
