# SPDX-License-Identifier: Apache-2.0
"""The statistics of the fidelity benchmarks on inputs whose answer is known."""

import math
import random

import bootstrap
import pytest


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    found = bootstrap.mean([5 + random.Random(i).gauss(0, 2) for i in range(400)])
    assert found.n == 400
    half = 1.96 * 2 / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low < found.value < found.high


def test_equal_values_have_no_spread() -> None:
    assert bootstrap.mean([0.25] * 9) == (0.25, 0.25, 0.25, 9)


def test_differences_are_paired() -> None:
    """Contexts differ by thousands, the method by one in each."""
    reference = [float(1000 * i) for i in range(12)]
    found = bootstrap.mean_difference([value + 1 for value in reference], reference)
    assert found == (1.0, 1.0, 1.0, 12)


def test_the_ratio_is_geometric_and_paired() -> None:
    reference = [10.0**-power for power in range(5)]
    halved = bootstrap.geometric_ratio([value / 2 for value in reference], reference)
    assert halved[:3] == pytest.approx((0.5, 0.5, 0.5)) and halved.n == 5
    # Twice as large once and half as large once is no difference.
    assert bootstrap.geometric_ratio([2.0, 1.0], [1.0, 2.0]).value == pytest.approx(1.0)


def test_noise_counts_as_the_floor() -> None:
    found = bootstrap.geometric_ratio([0.0, 1e-12], [1e-9, 0.0])
    assert found[:3] == pytest.approx((1.0, 1.0, 1.0))


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="an empty group: accepts at least 1 value"):
        bootstrap.mean([])
    with pytest.raises(ValueError, match="longer"):
        bootstrap.mean_difference([1.0], [1.0, 2.0])
