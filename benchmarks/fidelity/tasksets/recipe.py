# SPDX-License-Identifier: Apache-2.0
"""How a made-up sample is filled up to a length: its recipe takes an amount of filler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from tasksets.sample import Fitter, Sample

Recipe = Callable[[Random, int], Sample]
"""Makes a sample with an amount of filler from 1 up, the same for the same random state."""


def fill(recipe: Recipe, seed: str, length: int, fitter: Fitter) -> Sample:
    """The sample with the most filler that, with its reply, takes at most `length` tokens.

    Raises ValueError if the least filler takes more.
    """

    def made(amount: int) -> Sample:
        return recipe(Random(seed), amount)

    def fits(sample: Sample) -> bool:
        return fitter.count(sample) + sample.max_new_tokens <= length

    least = made(1)
    if not fits(least):
        needed = fitter.count(least) + least.max_new_tokens
        raise ValueError(f"--lengths: {length}: {least.task} accepts {needed} tokens or more")
    low, high = 1, 2
    while fits(made(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(made(middle)) else (low, middle)
    return made(low)


def inserted(text: Sequence[str], pieces: Sequence[str], places: Sequence[int]) -> list[str]:
    """`text` with each piece before the part of its place, 0 to len(text)."""
    result = list(text)
    # From the last place to the first, so that an insertion moves no other.
    for place, number in sorted(zip(places, range(len(pieces)), strict=True), reverse=True):
        result.insert(place, pieces[number])
    return result
