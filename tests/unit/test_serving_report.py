# SPDX-License-Identifier: Apache-2.0
"""What bench_serving.py makes of times and counters: statistics, ratios, the table, the plot."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.serving.generator import RequestTimes, request_times
from benchmarks.serving.measurement import Measurement
from benchmarks.serving.report import Spread, decoding_over_time, paired_ratio, plot, spread, table
from benchmarks.serving.server_state import ServerCounters
from benchmarks.serving.workloads import LoadShape
from lava_sglang.tools.load import LoadError

LATENCIES = {f"{name}_{p}": 10.0 for name in ("ttft", "tpot", "itl") for p in ("p50", "p99")}
SHAPE = LoadShape("unshared", 2, 100, 11)


def counters(**changes: Any) -> ServerCounters:
    values: dict[str, Any] = {
        "prefill_seconds": 5.0,
        "prefill_tokens": 200,
        "decode_moments": (10.0, 20.0, 1.0, 40.0, 2.0),
        "retractions": 1,
        "compression": None,
    }
    return ServerCounters(**values | changes)


def measurement(
    target: str = "stock", repeat: int = 0, seconds: float = 10.0, **changes: Any
) -> Measurement:
    requests = (RequestTimes(0, 2, 8, 100, 11), RequestTimes(0, 5, 10, 100, 11))
    values: dict[str, Any] = {
        "requests": requests,
        "latencies": LATENCIES,
        "counters": counters(),
        "peak_running": 2,
        "peak_used_slots": 150,
        "pool_slots": 250,
    }
    return Measurement(target, repeat, 0, seconds, **values | changes)


def test_a_measurement_adds_up() -> None:
    one = measurement()
    assert (one.prompt_tokens, one.output_tokens) == (200, 22)
    assert (one.request_throughput, one.output_throughput) == (0.2, 2.2)
    assert one.prefill_share == 0.5
    assert one.decode_throughput == 20 / 5
    assert one.peak_decoding == 2
    assert one.mean_decoding == pytest.approx(11 / 8)
    assert one.allowed_decoding == 2
    assert one.as_json()["decode_throughput"] == 4.0
    assert one.as_json()["requests"][0]["first_token"] == 2


def test_the_slots_allow_what_they_hold() -> None:
    compression = {"compressed": 2, "suffix_tokens": 160, "kept_tokens": 45, "slots_trimmed": 5}
    many = (RequestTimes(0, 2, 8, 100, 11),) * 2
    exact = measurement(pool_slots=120, requests=many)
    small = measurement(pool_slots=120, requests=many, counters=counters(compression=compression))
    assert (exact.allowed_decoding, small.allowed_decoding) == (1, 2)
    assert (
        measurement(pool_slots=101, counters=counters(compression=compression)).allowed_decoding
        == 1
    )


def test_a_run_that_is_all_prefill_has_no_decode_throughput() -> None:
    assert measurement(counters=counters(prefill_seconds=11.0)).decode_throughput == 0.0


def test_ratios_are_taken_repeat_by_repeat() -> None:
    runs = [measurement("stock", repeat, seconds) for repeat, seconds in enumerate([10, 20, 40])]
    runs += [measurement("lava@0.25", repeat, seconds) for repeat, seconds in enumerate([5, 8, 20])]
    found = paired_ratio(runs, "lava@0.25", "stock", lambda m: m.output_throughput)
    assert found == Spread(2.0, 2.0, 2.5)
    assert spread(runs, "stock", lambda m: m.seconds) == Spread(20, 10, 40)
    assert spread(runs, "stock", lambda m: None) is None
    assert paired_ratio(runs, "stock", "off", lambda m: m.seconds) is None


def test_counters_between_two_readings() -> None:
    compression = {"compressed": 3, "kept_tokens": 10}
    before = counters(compression=compression)
    after = counters(
        prefill_seconds=7.5,
        prefill_tokens=250,
        decode_moments=(11.0, 22.0, 1.5, 44.0, 2.5),
        retractions=None,
        compression={"compressed": 5, "kept_tokens": 40},
    )
    assert after.since(before) == ServerCounters(
        2.5, 50, (1.0, 2.0, 0.5, 4.0, 0.5), None, {"compressed": 2, "kept_tokens": 30}
    )


def test_times_count_from_the_first_request() -> None:
    record = {"first_token": 12.0, "last_token": 14.0, "prompt_tokens": 3, "output_tokens": 2}
    records = [{**record, "start": 11.0, "error": None}, {**record, "start": 10.0, "error": None}]
    found = request_times(records)
    assert [(r.start, r.first_token, r.last_token) for r in found] == [(0, 2, 4), (1, 2, 4)]
    records[0]["error"] = "no such model"
    with pytest.raises(LoadError, match="1 of 2 requests failed: no such model"):
        request_times(records)


def test_decoding_over_time() -> None:
    assert decoding_over_time(measurement()) == ([0.0, 2, 5, 8, 10], [0, 1, 2, 1, 0])


def test_the_table_has_values_spread_and_ratios() -> None:
    runs = [measurement("stock", r, s) for r, s in enumerate([10, 20])]
    runs += [measurement("off", r, 10) for r in range(2)]
    runs += [measurement("lava@0.25", r, 5, counters=counters(retractions=None)) for r in range(2)]
    screen = io.StringIO()
    console = Console(file=screen, width=160)
    console.print(table(SHAPE, 250, ["stock", "off", "lava@0.25"], runs))
    lines = [" ".join(line.split("│")[1:-1]).split() for line in screen.getvalue().splitlines()]
    text = {" ".join(line) for line in lines}
    assert "output tokens/s 1.7 (1.1 - 2.2) 2.2 4.4" in text
    assert "output throughput, x stock 1.00 1.50 (1.00 - 2.00) 3.00 (2.00 - 4.00)" in text
    assert "output throughput, x off 0.75 (0.50 - 1.00) 1.00 2.00" in text
    assert "retractions 1 1 -" in text
    assert "what the slots allow 2 2 2" in text
    assert not any(line.startswith("requests compressed") for line in text)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    plot(SHAPE, ["stock"], [measurement()], "machine", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
