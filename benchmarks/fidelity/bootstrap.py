# SPDX-License-Identifier: Apache-2.0
"""Means and ratios over contexts, with intervals from resampling the contexts in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
KL_FLOOR = 1e-6
"""KL below it counts as it: the noise of float32, and no logarithm of zero."""


class Estimate(NamedTuple):
    """A statistic over n contexts with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of at least one value, one a context."""
    return mean_of_means([values], seed)


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of the groups' means; each is resampled by itself, and counts the same."""
    if not groups or not all(len(values) for values in groups):
        raise ValueError("an empty group: accepts at least 1 value in each of at least 1")
    random = np.random.default_rng(seed)
    samples = [np.asarray(values, dtype=np.float64) for values in groups]
    resampled = np.zeros(RESAMPLES)
    for sample in samples:
        indices = random.integers(len(sample), size=(RESAMPLES, len(sample)))
        resampled += sample[indices].mean(axis=1) / len(samples)
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = float(np.mean([sample.mean() for sample in samples]))
    return Estimate(value, float(low), float(high), sum(len(sample) for sample in samples))


def mean_difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Mean of values - reference, paired: both lists are of the same contexts in order."""
    pairs = zip(values, reference, strict=True)
    return mean([value - other for value, other in pairs])


def geometric_ratio(
    values: Sequence[float], reference: Sequence[float], floor: float = KL_FLOOR
) -> Estimate:
    """Geometric mean of values / reference, paired as in `mean_difference`.

    Both are raised to `floor` first. Below 1 the values are smaller.
    """
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), floor))
    others = np.log(np.maximum(np.asarray(reference, dtype=np.float64), floor))
    found = mean_difference(logs.tolist(), others.tolist())
    value, low, high = np.exp(found[:3]).tolist()
    return Estimate(value, low, high, found.n)
