# SPDX-License-Identifier: Apache-2.0
"""What a server says about itself: counters before and after a run, its load during it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from lava_sglang.tools.client import ServerClient

RETRACTED = "sglang:num_retracted_requests_total"


@dataclass(frozen=True)
class ServerCounters:
    """Totals since the server's start, from `/v1/loads`, `/metrics` and `/server_info`.

    None: this server does not count it (no --enable-metrics; no compression).
    """

    prefill_seconds: float  # a prefill running, compression included
    prefill_tokens: int  # computed, not taken from the radix tree
    # Over decode steps that follow one another: how many; sums of b, t, b * b and b * t, where b is
    # the number of requests of a step and t its seconds.
    decode_moments: tuple[float, ...]
    retractions: int | None
    compression: dict[str, int] | None

    @classmethod
    def read(cls, client: ServerClient) -> ServerCounters:
        loads = client.loads()
        moments = [load.get("decode_moments") or [0.0] * 6 for load in loads]
        count, b, t, bb, bt = (sum(moment[i] for moment in moments) for i in range(5))
        return cls(
            sum(load["total_prefill_busy_us"] for load in loads) / 1e6,
            sum(load["total_prefill_uncached_tokens"] for load in loads),
            (count, b, t / 1e6, bb, bt / 1e6),
            _retractions(client),
            _compression(client),
        )

    def since(self, before: ServerCounters) -> ServerCounters:
        """What was counted between the two."""
        retractions = compression = None
        if self.retractions is not None and before.retractions is not None:
            retractions = self.retractions - before.retractions
        if self.compression is not None and before.compression is not None:
            earlier = before.compression
            compression = {key: n - earlier[key] for key, n in self.compression.items()}
        pairs = zip(self.decode_moments, before.decode_moments, strict=True)
        return ServerCounters(
            self.prefill_seconds - before.prefill_seconds,
            self.prefill_tokens - before.prefill_tokens,
            tuple(after - earlier for after, earlier in pairs),
            retractions,
            compression,
        )


class LoadSampler:
    """Peaks of `/v1/loads` while a `with` block runs, from a thread of its own.

    The server answers from a snapshot in shared memory: its scheduler takes no notice.
    """

    def __init__(self, client: ServerClient, seconds: float = 0.5):
        self.client = client
        self.seconds = seconds
        self.peak_running = 0  # requests
        self.peak_used_slots = 0  # held by requests; what only the radix tree holds is free
        self.pool_slots = 0
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                loads = self.client.loads()
                running, used, pool = (
                    sum(int(load[name]) for load in loads)
                    for name in ("num_running_reqs", "num_used_tokens", "max_total_num_tokens")
                )
                self.peak_running = max(self.peak_running, running)
                self.peak_used_slots = max(self.peak_used_slots, used)
                self.pool_slots = pool
                self._stop.wait(self.seconds)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self._error = error


def _retractions(client: ServerClient) -> int | None:
    try:
        samples = client.metrics()
    except httpx.HTTPStatusError:
        return None
    if not any(sample.name.startswith("sglang:") for sample in samples):
        return None  # SGLang makes the counter with its first value
    return int(sum(sample.value for sample in samples if sample.name == RETRACTED))


def _compression(client: ServerClient) -> dict[str, int] | None:
    stats = client.compression_stats()
    if not stats:
        return None
    totals = {"compressed": sum(each["requests"]["compressed"] for each in stats)}
    for name in ("prompt_tokens", "suffix_tokens", "kept_tokens", "trims", "slots_trimmed"):
        totals[name] = sum(each[name] for each in stats)
    return totals
