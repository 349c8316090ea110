# SPDX-License-Identifier: Apache-2.0
"""What arrives: requests with their lengths and times, drawn at random or read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 65_536  # requests drawn at once


class TraceError(ValueError):
    """A trace that cannot be. The message names the field, the value and what it accepts."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. The first `shared_tokens` of its prompt are those of its `group`."""

    seconds: float
    prompt_tokens: int
    output_tokens: int  # what it will generate
    max_new_tokens: int  # what it asks for: admission knows no more
    group: int = -1  # -1: shares nothing
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "output_tokens": 1, "max_new_tokens": self.output_tokens}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise TraceError(
                    f"{name}={getattr(self, name)}: accepts a whole number from {minimum} up"
                )
        if not 0 <= self.shared_tokens < self.prompt_tokens:
            raise TraceError(
                f"shared_tokens={self.shared_tokens}: accepts a whole number from 0 to "
                f"{self.prompt_tokens - 1}"
            )


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: the median is about the mean for spread 0, which is constant."""

    mean: float
    spread: float = 0.0  # standard deviation of the logarithm
    most: int = 1 << 20

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count], at least 1."""
        mu = math.log(self.mean) - self.spread**2 / 2
        drawn = np.exp(generator.normal(mu, self.spread, count))
        return np.clip(np.rint(drawn), 1, self.most).astype(np.int64)


@dataclass(frozen=True)
class Synthetic:
    """Poisson arrivals of requests whose lengths are drawn independently."""

    requests: int
    rate: float  # requests a second; infinite: all at the start
    prompt: Lengths
    output: Lengths
    # A request asks for this many times the mean output, and never for less than it generates.
    asked: float = 4.0
    groups: int = 0  # requests of a group share the first `shared_tokens` of their prompts
    shared_tokens: int = 0
    seed: int = 0

    def __iter__(self) -> Iterator[Arrival]:
        generator = np.random.default_rng(self.seed)
        now, left = 0.0, self.requests
        while left:
            count = min(left, BLOCK)
            left -= count
            gaps = generator.exponential(1 / self.rate, count)
            times = (now + np.cumsum(gaps)).tolist()
            now = times[-1]
            prompts = self.prompt.draw(generator, count).tolist()
            outputs = self.output.draw(generator, count).tolist()
            groups = generator.integers(0, max(self.groups, 1), count).tolist()
            limit = round(self.asked * self.output.mean)
            for seconds, prompt, output, group in zip(times, prompts, outputs, groups, strict=True):
                shared = min(self.shared_tokens, prompt - 1) if self.groups else 0
                yield Arrival(
                    seconds, prompt, output, max(limit, output), group if shared else -1, shared
                )


def read_trace(path: Path) -> Iterator[Arrival]:
    """A JSON object a line, with the names of `Arrival`'s fields; `max_new_tokens` may be left out.

    Lines are in the order of `seconds`. Raises TraceError.
    """
    last = -math.inf
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                arrival = Arrival(**{"max_new_tokens": values["output_tokens"], **values})
            except (ValueError, TypeError, KeyError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
            if arrival.seconds < last:
                raise TraceError(
                    f"{path}, line {number}: seconds={arrival.seconds}: accepts numbers from "
                    f"{last} up, the line's before"
                )
            last = arrival.seconds
            yield arrival
