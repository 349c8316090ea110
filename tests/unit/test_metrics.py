# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: totals, Prometheus series, timings."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lava_sglang.metrics import CompressionStats, PrometheusSeries, StreamTimer, running_totals


class Plan(NamedTuple):
    """The numbers of a CompressionPlan."""

    prompt_len: int
    suffix_len: int


@dataclass
class Request:
    """What the totals read of a LavaReq."""

    plan: Plan | None = None
    budget: int | None = None
    slots_freed: int = 0
    skip_reason: str | None = None
    is_health_check: bool = False

    @property
    def compressed(self) -> bool:
        return self.budget is not None


COMPRESSED = Request(Plan(1000, 800), budget=200, slots_freed=600)
SMALL = Request(Plan(100, 100), budget=40, slots_freed=60)
TOO_SHORT = Request(skip_reason="too_short")
NO_ROOM = Request(Plan(500, 500), skip_reason="no_room")
LABELS = {"model_name": "demo", "tp_rank": "0"}


def test_totals_count_each_outcome_and_only_compressed_tokens() -> None:
    stats = CompressionStats()
    for req in (COMPRESSED, SMALL, TOO_SHORT, TOO_SHORT, NO_ROOM):
        stats.count(req)  # type: ignore[arg-type]
    assert stats.snapshot([]) == {
        "requests": {"compressed": 2, "skipped": {"no_room": 1, "too_short": 2}},
        "prompt_tokens": 1100,
        "suffix_tokens": 900,
        "kept_tokens": 240,
        "slots_freed": 660,
        "trims": 0,
        "slots_trimmed": 0,
        "running_compressed_requests": 0,
        "running_slots_saved": 0,
    }


def test_nothing_counted_is_all_zero() -> None:
    assert CompressionStats().snapshot([])["requests"] == {"compressed": 0, "skipped": {}}


def test_running_requests_are_counted_while_they_run() -> None:
    running: Any = [COMPRESSED, TOO_SHORT, NO_ROOM, SMALL]
    assert running_totals(running) == (2, 660)
    snapshot = CompressionStats().snapshot(running)
    assert snapshot["running_compressed_requests"] == 2
    assert snapshot["running_slots_saved"] == 660
    assert snapshot["slots_freed"] == 0  # totals are of what was counted, not of what runs


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrometheusSeries]:
    """The series in the process-wide registry, and gone after the test."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    made = PrometheusSeries(LABELS)
    yield made
    for collector in (
        made.requests,
        made.tokens,
        made.trims,
        made.running,
        made.saved,
        made.seconds,
    ):
        prometheus_client.REGISTRY.unregister(collector)


def scrape() -> dict[tuple[str, str], float]:
    """(sample name, its own label) -> value, of our series as `/metrics` shows them."""
    samples = {}
    text = prometheus_client.generate_latest().decode()
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("sglang:kv_compression"):
            continue
        assert family.documentation
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in LABELS}
            assert LABELS.items() <= sample.labels.items()
            samples[sample.name, next(iter(own.values()), "")] = sample.value
    return samples


def test_counters_have_sglangs_labels_and_the_outcome(series: PrometheusSeries) -> None:
    stats = CompressionStats()
    stats.prometheus = series
    for req in (COMPRESSED, SMALL, TOO_SHORT, NO_ROOM):
        stats.count(req)  # type: ignore[arg-type]
    found = scrape()
    requests = "sglang:kv_compression_requests_total"
    assert {k: found[requests, k] for k in ("compressed", "too_short", "no_room")} == {
        "compressed": 2,
        "too_short": 1,
        "no_room": 1,
    }
    tokens = "sglang:kv_compression_tokens_total"
    assert (found[tokens, "kept"], found[tokens, "freed"]) == (240, 660)


def test_gauges_follow_what_runs_and_the_histogram_counts(series: PrometheusSeries) -> None:
    series.observe((3, 900), [0.004, 0.03])
    series.observe((2, 500), [0.1])
    found = scrape()
    assert found["sglang:kv_compression_running_requests", ""] == 2
    assert found["sglang:kv_compression_running_slots_saved", ""] == 500
    assert found["sglang:kv_compression_seconds_count", ""] == 3
    assert found["sglang:kv_compression_seconds_sum", ""] == pytest.approx(0.134)
    assert found["sglang:kv_compression_seconds_bucket", "0.005"] == 1
    assert found["sglang:kv_compression_seconds_bucket", "0.05"] == 2


def test_a_span_is_timed_and_taken_once() -> None:
    timer = StreamTimer("cpu")
    for _ in range(2):
        with timer:
            time.sleep(0.02)
    spans = timer.take()
    assert len(spans) == 2 and all(0.02 <= seconds < 5 for seconds in spans)
    assert timer.take() == []


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_cpu_spans_need_no_device(device: str) -> None:
    assert StreamTimer(device).on_device is False
    assert StreamTimer("cuda:1").on_device is True


class Event:
    """A device event that passes when told."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end: "Event") -> float:
        return end.milliseconds - self.milliseconds


def test_a_span_on_a_device_is_taken_when_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Event(ms) for ms in (0, 5, 5, 20)]
    marks = iter(events)
    timer = StreamTimer("cuda")
    monkeypatch.setattr(timer, "_mark", lambda: next(marks))
    for _ in range(2):
        with timer:
            pass
    assert timer.take() == []
    events[1].passed = True
    assert timer.take() == [0.005]
    events[3].passed = True
    assert timer.take() == [0.015]


def test_an_error_inside_a_span_is_not_swallowed() -> None:
    timer = StreamTimer("cpu")
    with pytest.raises(KeyError), timer:
        raise KeyError("inside")
