# SPDX-License-Identifier: Apache-2.0
"""The file of measurements survives being cut off and refuses what is not its own."""

import json
from pathlib import Path

import pytest
from results import Results, ResultsError

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
