# SPDX-License-Identifier: Apache-2.0
"""What a simulation came to."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lava_sglang.metrics import CompressionStats


@dataclass
class Outcome:
    """Seconds are modelled. Counts are of requests, tokens and slots."""

    pool_slots: int
    seconds: float = 0.0
    refused: int = 0  # larger than the pool
    compressed: int = 0  # prefills: a retracted request counts again
    trims: int = 0  # steps down a ladder
    kept_share: float = 1.0  # part of the compressed suffixes that was kept, in the end
    retractions: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    output_tokens: int = 0
    peak_running: int = 0
    peak_used_slots: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    tpot: array[float] = field(default_factory=lambda: array("d"))
    _running_steps: int = 0  # sum over decode steps of the requests in them

    @property
    def answered(self) -> int:
        return len(self.ttft)

    @property
    def request_throughput(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def prefill_share(self) -> float:
        return self.prefill_seconds / self.seconds if self.seconds else 0.0

    @property
    def mean_running(self) -> float:
        """Requests in a decode step."""
        return self._running_steps / self.decode_steps if self.decode_steps else 0.0

    def count_prefill(self, tokens: int, used_slots: int) -> None:
        self.prefill_tokens += tokens
        self.peak_used_slots = max(self.peak_used_slots, used_slots)

    def count_running(self, requests: int) -> None:
        self.peak_running = max(self.peak_running, requests)

    def count_decode(self, steps: int, requests: int, seconds: float, used_slots: int) -> None:
        self.decode_steps += steps
        self.decode_seconds += seconds
        self._running_steps += steps * requests
        self.peak_used_slots = max(self.peak_used_slots, used_slots)

    def count_compressions(self, stats: CompressionStats) -> None:
        """At the end."""
        self.compressed, self.trims = stats.requests["compressed"], stats.trims
        if stats.suffix_tokens:
            self.kept_share = (stats.kept_tokens - stats.slots_trimmed) / stats.suffix_tokens

    def answer(self, arrived: float, first_token: float, now: float, output_tokens: int) -> None:
        """A request is answered."""
        self.output_tokens += output_tokens
        self.ttft.append(first_token - arrived)
        if output_tokens > 1:
            self.tpot.append((now - first_token) / (output_tokens - 1))

    def as_json(self) -> dict[str, Any]:
        """Totals, rates and quantiles; seconds."""
        names = (
            "pool_slots", "seconds", "answered", "refused", "compressed", "trims", "kept_share",
            "retractions",
            "prefill_tokens", "prefill_seconds", "decode_steps", "decode_seconds",
            "output_tokens", "request_throughput", "output_throughput", "prefill_share",
            "peak_running", "mean_running", "peak_used_slots",
        )  # fmt: skip
        quantiles = {
            f"{name}_p{percent}": quantile(values, percent)
            for name, values in (("ttft", self.ttft), ("tpot", self.tpot))
            for percent in (50, 99)
        }
        return {name: getattr(self, name) for name in names} | quantiles


def quantile(values: array[float], percent: float) -> float:
    """0 of none."""
    return float(np.percentile(np.asarray(values), percent)) if len(values) else 0.0
