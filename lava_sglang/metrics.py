# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: totals for `/server_info`, Prometheus series, parts of the log lines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lava_sglang.managers.request import LavaReq


class CompressionStats:
    """Totals of one scheduler since its start. A retracted request counts at each prefill, one
    that is compressed later twice: with the reason it was exact at first, and as compressed."""

    def __init__(self, prometheus: PrometheusSeries | None = None) -> None:
        self.requests: Counter[str] = Counter()  # "compressed", or the reason it was skipped
        self.prompt_tokens = 0  # of compressed requests
        self.suffix_tokens = 0
        self.kept_tokens = 0
        self.slots_freed = 0
        self.trims = 0  # steps down a ladder
        self.slots_trimmed = 0
        self.prometheus = prometheus

    def count(self, req: LavaReq) -> None:
        """Called once a request's prefill has been launched."""
        if req.is_health_check:
            return
        outcome = "compressed" if req.compressed else str(req.skip_reason)
        self.requests[outcome] += 1
        if req.budget is not None and req.plan is not None:
            self.prompt_tokens += req.plan.prompt_len
            self.suffix_tokens += req.plan.suffix_len
            self.kept_tokens += req.budget
            self.slots_freed += req.slots_freed
        if self.prometheus is not None:
            self.prometheus.count(req, outcome)

    def count_trim(self, slots: int) -> None:
        """Called once a running request went one rung down and freed so many slots."""
        self.trims += 1
        self.slots_trimmed += slots
        if self.prometheus is not None:
            self.prometheus.trims.labels(**self.prometheus.labels).inc()

    def snapshot(self, running: Iterable[LavaReq]) -> dict[str, Any]:
        """The `kv_compression` entry of `/server_info`; token and slot counts."""
        compressed, saved = running_totals(running)
        skipped = {k: v for k, v in sorted(self.requests.items()) if k != "compressed"}
        return {
            "requests": {"compressed": self.requests["compressed"], "skipped": skipped},
            "prompt_tokens": self.prompt_tokens,
            "suffix_tokens": self.suffix_tokens,
            "kept_tokens": self.kept_tokens,
            "slots_freed": self.slots_freed,
            "trims": self.trims,
            "slots_trimmed": self.slots_trimmed,
            "running_compressed_requests": compressed,
            "running_slots_saved": saved,
        }


def running_totals(running: Iterable[LavaReq]) -> tuple[int, int]:
    """Compressed requests among `running`, and the slots that they do without."""
    freed = [req.slots_freed for req in running if req.compressed]
    return len(freed), sum(freed)


class PrometheusSeries:
    """`sglang:kv_compression_*`, with the labels of SGLang's own scheduler series."""

    def __init__(self, labels: dict[str, str]):
        # After SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter as PromCounter
        from prometheus_client import Gauge, Histogram

        names = list(labels)
        self.labels = labels
        self._running: tuple[int, int] | None = None
        self.requests = PromCounter(
            "sglang:kv_compression_requests_total",
            "Requests by outcome: compressed, or the reason they were not.",
            [*names, "outcome"],
        )
        self.tokens = PromCounter(
            "sglang:kv_compression_tokens_total",
            "Suffix tokens of compressed requests, by whether their slots were kept or freed.",
            [*names, "kind"],
        )
        self.trims = PromCounter(
            "sglang:kv_compression_trims_total",
            "Steps of running requests down the ladder of budgets.",
            names,
        )
        self.running = Gauge(
            "sglang:kv_compression_running_requests",
            "Compressed requests that are decoding.",
            names,
            multiprocess_mode="mostrecent",
        )
        self.saved = Gauge(
            "sglang:kv_compression_running_slots_saved",
            "Slots that the decoding compressed requests do without.",
            names,
            multiprocess_mode="mostrecent",
        )
        self.seconds = Histogram(
            "sglang:kv_compression_seconds",
            "Time to score, select and copy one request.",
            names,
            buckets=[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5],
        )

    def count(self, req: LavaReq, outcome: str) -> None:
        self.requests.labels(**self.labels, outcome=outcome).inc()
        if req.budget is not None:
            self.tokens.labels(**self.labels, kind="kept").inc(req.budget)
            self.tokens.labels(**self.labels, kind="freed").inc(req.slots_freed)

    def observe(self, running: tuple[int, int], seconds: Iterable[float]) -> None:
        """running: what `running_totals` returned. seconds: compressions finished since."""
        if running != self._running:  # an idle server asks again and again
            self._running = running
            self.running.labels(**self.labels).set(running[0])
            self.saved.labels(**self.labels).set(running[1])
        for value in seconds:
            self.seconds.labels(**self.labels).observe(value)


class StreamTimer:
    """Times device work by events, read when they have passed: no step waits for the device."""

    def __init__(self, device: str):
        self.on_device = not str(device).startswith("cpu")
        # Bounded: ranks that log nothing take their times only when idle.
        self.pending: deque[tuple[Any, Any]] = deque(maxlen=1024)
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *exc: object) -> None:
        self.pending.append((self._start, self._mark()))

    def take(self) -> list[float]:
        """Seconds of each span that has ended since the last call."""
        done = []
        while self.pending and (not self.on_device or self.pending[0][1].query()):
            start, end = self.pending.popleft()
            done.append(start.elapsed_time(end) / 1000 if self.on_device else end - start)
        return done

    def _mark(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
