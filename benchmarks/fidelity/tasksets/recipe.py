# SPDX-License-Identifier: Apache-2.0
"""How a made-up sample is filled up to a length: its recipe takes an amount of filler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from tasksets.sample import Fitter, Sample

Recipe = Callable[[Random, int], Sample]
"""Makes a sample with an amount of filler from 1 up, the same for the same random state."""


def fill(recipe: Recipe, seed: str, length: int, fitter: Fitter) -> Sample:
    """The sample with the most filler that, with its reply, takes at most `length` tokens.

    Raises ValueError if the least filler takes more.
    """

    def made(amount: int) -> tuple[Sample, int]:
        """A sample and its tokens."""
        sample = recipe(Random(seed), amount)
        return sample, fitter.count(sample) + sample.max_new_tokens

    best, low_size = made(1)
    if low_size > length:
        raise ValueError(f"--lengths: {length}: {best.task} accepts {low_size} tokens or more")
    low, high = 1, 32
    high_sample, high_size = made(high)
    # Tokens grow with the filler almost in a line: a few samples are made, not one for each bit.
    while high_size <= length:
        slope = (high_size - low_size) / (high - low)
        best, low, low_size = high_sample, high, high_size
        high = low + math.ceil((length - low_size) / max(slope, 1) * 1.02) + 1
        high_sample, high_size = made(high)
    while high - low > 1:
        guess = low + int((high - low) * (length - low_size) / (high_size - low_size))
        middle = min(max(guess, low + 1), high - 1)
        sample, size = made(middle)
        if size <= length:
            best, low, low_size = sample, middle, size
        else:
            high, high_size = middle, size
    return best


def inserted(text: Sequence[str], pieces: Sequence[str], places: Sequence[int]) -> list[str]:
    """`text` with each piece before the part of its place, 0 to len(text)."""
    result = list(text)
    # From the last place to the first, so that an insertion moves no other.
    for place, number in sorted(zip(places, range(len(pieces)), strict=True), reverse=True):
        result.insert(place, pieces[number])
    return result
