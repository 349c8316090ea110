# SPDX-License-Identifier: Apache-2.0
"""What is measured of concurrent streams: by hand, and on a server that decodes two at a time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lava_sglang.tools.load import (
    ConcurrencyResult,
    LoadError,
    LoadProgress,
    RequestTrace,
    measure_concurrency,
    peak_overlap,
)
from lava_sglang.tools.server_process import Server

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Server([], log_path=tmp_path_factory.mktemp("fake") / "log", command=FAKE) as server:
        yield server.url


@pytest.mark.parametrize(
    ("spans", "peak"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(0, 2), (1, 3)], 2),
        ([(0, 1), (2, 3)], 1),
        ([(0, 1), (1, 2)], 1),
        ([(0, 9), (1, 2), (3, 4), (3.5, 5)], 3),
        ([(0, 4), (1, 4), (2, 4)], 3),
        ([(2, 2)], 0),
        ([(0, 3), (1, 1)], 1),
    ],
    ids=[
        "none",
        "one",
        "two",
        "apart",
        "one after the other",
        "inside",
        "ending together",
        "one token",
        "one token inside",
    ],
)
def test_peak_overlap(spans: list[tuple[float, float]], peak: int) -> None:
    assert peak_overlap(spans) == peak
    assert peak_overlap(reversed(spans)) == peak


def test_a_trace_dates_tokens_not_outputs() -> None:
    trace = RequestTrace()
    assert trace.state == "waiting"
    trace.update({"text": "", "meta_info": {"completion_tokens": 0}}, 0.5)
    assert trace.state == "waiting"
    trace.update({"text": "a", "meta_info": {"completion_tokens": 1}}, 1.0)
    trace.update({"text": "ab", "meta_info": {"completion_tokens": 2}}, 2.0)
    info = {"completion_tokens": 2, "kv_compression": {"kept_tokens": 5}}
    trace.update({"text": "ab", "meta_info": info}, 3.0)
    assert trace.state == "decoding"
    assert (trace.first_token, trace.last_token, trace.tokens, trace.text) == (1.0, 2.0, 2, "ab")
    assert trace.compression == {"kept_tokens": 5}
    trace.finished = True
    assert trace.state == "done"


def test_progress_is_one_line() -> None:
    requests = [RequestTrace(), RequestTrace(first_token=1.0), RequestTrace(finished=True)]
    now = LoadProgress(12.3, requests, 4012)
    assert str(now) == "12 s: 1 waiting, 1 decoding, 1 done; 4,012 slots held"


def test_result_adds_up() -> None:
    responses = [RequestTrace(tokens=n, meta_info={"num_retractions": n - 1}) for n in (1, 3)]
    result = ConcurrencyResult(2, 100, 1.5, tuple(responses))
    assert (result.retractions, result.generated_tokens) == (2, 4)


def test_five_streams_on_a_server_that_decodes_two(url: str) -> None:
    seen: list[tuple[int, int]] = []

    def on_progress(now: LoadProgress) -> None:
        seen.append((now.count("decoding"), now.used_slots))

    result = measure_concurrency(
        url, [[9, 9]] * 5, max_new_tokens=20, on_progress=on_progress, kv_compression={"a": 1}
    )
    assert result.peak_decoding == 2
    assert result.peak_used_slots == 200
    assert result.seconds >= 3 * 19 * 0.05
    assert [r.tokens for r in result.responses] == [20] * 5
    assert {r.state for r in result.responses} == {"done"}
    assert all(r.text == "word " * 20 and r.compression == {"a": 1} for r in result.responses)
    assert result.retractions == 5
    assert max(decoding for decoding, _ in seen) <= 2
    assert seen[-1][0] == 0


def test_server_settings_hold_where_no_custom_ones_are_sent(url: str) -> None:
    (response,) = measure_concurrency(url, [[9]], max_new_tokens=2).responses
    assert response.compression["status"] == "compressed"


@pytest.mark.parametrize(
    ("first_token", "message"),
    [(400, "too long"), (1, "budget=7: accepts a fraction"), (2, "aborted")],
)
def test_a_failed_request_is_an_error(url: str, first_token: int, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        measure_concurrency(url, [[9], [first_token]], max_new_tokens=4)
