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
    if not len(values):
        raise ValueError("0 values: accepts at least 1")
    sample = np.asarray(values, dtype=np.float64)
    indices = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(sample[indices].mean(axis=1), [2.5, 97.5])
    return Estimate(float(sample.mean()), float(low), float(high), len(sample))


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
    return Estimate(*np.exp(found[:3]).tolist(), found.n)
