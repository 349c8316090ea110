# SPDX-License-Identifier: Apache-2.0
"""What is kept of measurements and made of them: the file, the statistics, the pictures."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity import bootstrap, divergence, needle
from benchmarks.fidelity.results import Results, ResultsError


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


PNG = b"\x89PNG"


def divergence_record(context: int, method: str, budget: float) -> dict[str, Any]:
    return {
        "context": f"c{context}",
        "source": "book",
        "prompt_tokens": 1000,
        "method": method,
        "budget": budget,
        "kept_tokens": 128,
        "kl": 0.1 * (context + 1) * (2 if method == "random" else 1),
        "top1": 0.9,
        "nll_change": 0.1,
    }


def needle_record(number: int, method: str, budget: float | None) -> dict[str, Any]:
    return {
        "needle": f"n{number}",
        "kind": "digits5",
        "length": 1000 * (1 + number % 2),
        "depth": number / 10,
        "distractors": 0,
        "question": "inside",
        "method": method,
        "budget": budget,
        "exact_match": 1.0 if method == "full" else float(number % 4 == 0),
        "nll": 0.5,
    }


def test_divergence_is_drawn(tmp_path: Path) -> None:
    records = [
        divergence_record(context, method, budget)
        for context in range(3)
        for method in ("lava", "random")
        for budget in (64, 128, 0.25)
    ]
    divergence.plot(records, tmp_path / "kl.png", "lava")
    assert (tmp_path / "kl.png").read_bytes().startswith(PNG)


def test_needles_are_drawn(tmp_path: Path) -> None:
    records = [needle_record(number, "full", None) for number in range(10)]
    with pytest.raises(ValueError, match="no needle with the question inside was found in full"):
        needle.plot_depths(records, tmp_path / "depths.png")
    records += [
        needle_record(number, "lava", budget) for number in range(10) for budget in (64, 0.25)
    ]
    needle.plot_needles(records, tmp_path / "needles.png")
    needle.plot_depths(records, tmp_path / "depths.png")
    for name in ("needles.png", "depths.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="nothing to draw"):
        needle.plot_needles([], tmp_path / "none.png")


def test_the_grid_is_depth_by_length() -> None:
    records = [needle_record(number, "lava", 64) for number in range(10)]
    records[9]["depth"] = 1.0
    grid = needle.depth_by_length(records, [1000, 2000, 3000])
    # Even numbers have 1,000 tokens, odd ones 2,000; 0, 4 and 8 are found.
    assert [row[0] for row in grid] == [1, 0, 1, 0, 1]
    assert [row[1] for row in grid] == [0, 0, 0, 0, 0]
    assert all(math.isnan(row[2]) for row in grid)


KEY = ("context", "method")
SETTINGS = {"model": "tiny", "seed": 0}
RECORDS = [{"context": "a", "method": m, "kl": kl} for m, kl in (("lava", 0.5), ("random", 2.0))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    results = Results(tmp_path / "new" / "run.jsonl", KEY, SETTINGS)
    for record in RECORDS:
        results.add(record)
    return tmp_path / "new" / "run.jsonl"


def test_a_later_run_finds_every_record(path: Path) -> None:
    results = Results(path, KEY, SETTINGS)
    assert list(results) == RECORDS
    assert results.get("a", "lava") == RECORDS[0]
    assert results.get("b", "lava") is None
    results.add({"context": "b", "method": "lava", "kl": 0.1})
    assert len(Results(path, KEY, SETTINGS)) == 3


def test_half_a_line_is_dropped(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"context": "b", "met')
    results = Results(path, KEY, SETTINGS)
    assert list(results) == RECORDS
    results.add({"context": "b", "method": "lava", "kl": 0.1})
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == list(results)


def test_other_settings_are_refused(path: Path) -> None:
    with pytest.raises(ResultsError, match=r"'seed': 0.*'seed': 1.*--no-resume"):
        Results(path, KEY, {**SETTINGS, "seed": 1})
    assert len(Results(path, KEY, {**SETTINGS, "seed": 1}, resume=False)) == 0


def test_a_key_is_recorded_once(path: Path) -> None:
    with pytest.raises(ResultsError, match=r"\('a', 'lava'\): recorded twice"):
        Results(path, KEY, SETTINGS).add(RECORDS[0])


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    results = Results(None, KEY, SETTINGS)
    results.add(RECORDS[0])
    assert list(results) == RECORDS[:1] and list(tmp_path.iterdir()) == []
