# SPDX-License-Identifier: Apache-2.0
"""The pictures are drawn from records alone, and the depth grid counts what it should."""

import math
from pathlib import Path
from typing import Any

import plots
import pytest

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
    plots.plot_divergence(records, tmp_path / "kl.png", "lava")
    assert (tmp_path / "kl.png").read_bytes().startswith(PNG)


def test_needles_are_drawn(tmp_path: Path) -> None:
    records = [needle_record(number, "full", None) for number in range(10)]
    with pytest.raises(ValueError, match="no needle with the question inside was found in full"):
        plots.plot_depths(records, tmp_path / "depths.png")
    records += [
        needle_record(number, "lava", budget) for number in range(10) for budget in (64, 0.25)
    ]
    plots.plot_needles(records, tmp_path / "needles.png")
    plots.plot_depths(records, tmp_path / "depths.png")
    for name in ("needles.png", "depths.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_needles([], tmp_path / "none.png")


def test_the_grid_is_depth_by_length() -> None:
    records = [needle_record(number, "lava", 64) for number in range(10)]
    records[9]["depth"] = 1.0
    grid = plots.depth_by_length(records, [1000, 2000, 3000])
    # Even numbers have 1,000 tokens, odd ones 2,000; 0, 4 and 8 are found.
    assert [row[0] for row in grid] == [1, 0, 1, 0, 1]
    assert [row[1] for row in grid] == [0, 0, 0, 0, 0]
    assert all(math.isnan(row[2]) for row in grid)
