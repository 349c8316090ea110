# SPDX-License-Identifier: Apache-2.0
"""One run of one load against one server, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.serving.generator import COMMAND, GeneratorResult, RequestTimes, Traffic, generate
from benchmarks.serving.server_state import LoadSampler, ServerCounters
from benchmarks.serving.targets import Target
from benchmarks.serving.workloads import Conversation
from lava_sglang.tools.client import ServerClient
from lava_sglang.tools.load import peak_overlap

LATENCIES = ("ttft", "tpot", "itl")


@dataclass(frozen=True)
class Measurement:
    """Seconds, tokens and requests of one run; `latencies` in milliseconds."""

    target: str
    repeat: int
    seed: int
    seconds: float  # from the first request sent to the last answer
    requests: tuple[RequestTimes, ...]
    latencies: dict[str, float]  # ttft_p50, ttft_p99, tpot_p50, ...: as SGLang defines them
    counters: ServerCounters
    peak_running: int  # requests in the server's batch, sampled
    peak_used_slots: int  # sampled
    pool_slots: int

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    @property
    def request_throughput(self) -> float:
        return len(self.requests) / self.seconds

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def prefill_share(self) -> float:
        """Part of the time in which a prefill ran, compression included."""
        return min(self.counters.prefill_seconds / self.seconds, 1.0)

    @property
    def decode_throughput(self) -> float:
        """Output tokens but the first ones, which come from prefills, by the time without any."""
        seconds = self.seconds * (1 - self.prefill_share)
        return (self.output_tokens - len(self.requests)) / seconds if seconds else 0.0

    @property
    def peak_decoding(self) -> int:
        """Exact: the most answers that overlap, from their first to their last token."""
        return peak_overlap((times.first_token, times.last_token) for times in self.requests)

    @property
    def mean_decoding(self) -> float:
        """Requests decoding at once, over the time in which any does."""
        spans = [(times.first_token, times.last_token) for times in self.requests]
        busy = max(end for _, end in spans) - min(start for start, _ in spans)
        return sum(end - start for start, end in spans) / busy if busy else 0.0

    @property
    def allowed_decoding(self) -> int:
        """How many requests of this load fit the pool while they decode, if they share nothing."""
        held = self.prompt_tokens
        if self.counters.compression is not None:
            compression = self.counters.compression
            held += compression["kept_tokens"] - compression["slots_trimmed"]
            held -= compression["suffix_tokens"]
        each = (held + self.output_tokens) / len(self.requests)
        return min(int(self.pool_slots / each), len(self.requests))

    def as_json(self) -> dict[str, Any]:
        """All fields and all properties."""
        properties = (
            "prompt_tokens", "output_tokens", "request_throughput", "output_throughput",
            "decode_throughput", "prefill_share", "peak_decoding", "mean_decoding",
            "allowed_decoding",
        )  # fmt: skip
        return asdict(self) | {name: getattr(self, name) for name in properties}


def measure(
    url: str,
    target: Target,
    load: Sequence[Conversation],
    traffic: Traffic,
    repeat: int,
    seed: int,
    command: Sequence[str] = COMMAND,
) -> Measurement:
    """Raises LoadError or httpx.HTTPError."""
    with ServerClient(url) as client:
        before = ServerCounters.read(client)
        with LoadSampler(client) as sampler:
            result = generate(url, load, traffic, seed, target.custom_params, command)
        counters = ServerCounters.read(client).since(before)
    return Measurement(
        target.name,
        repeat,
        seed,
        float(result.summary["duration"]),
        result.requests,
        latencies(result),
        counters,
        sampler.peak_running,
        sampler.peak_used_slots,
        sampler.pool_slots,
    )


def latencies(result: GeneratorResult) -> dict[str, float]:
    """The median and the 99th percentile of each, in milliseconds."""
    names = {"p50": "median", "p99": "p99"}
    return {
        f"{latency}_{name}": float(result.summary[f"{sglangs}_{latency}_ms"])
        for latency in LATENCIES
        for name, sglangs in names.items()
    }


def warm_up(url: str, conversation: Conversation) -> None:
    """A few tokens for the first turn of `conversation`, so that nothing is loaded later."""
    with ServerClient(url) as client:
        client.chat(conversation[0], max_tokens=8)
