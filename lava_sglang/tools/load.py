# SPDX-License-Identifier: Apache-2.0
"""Sends prompts to a server at the same time and measures how many of them decode at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from lava_sglang.tools.client import AsyncServerClient, generate_body

SAMPLE_SECONDS = 0.2
STATES = ("waiting", "decoding", "done")


class LoadError(RuntimeError):
    """The server ended a request with an error; the message is its own."""


@dataclass
class RequestTrace:
    """One streaming request. Times are seconds since the first request was sent."""

    first_token: float | None = None
    last_token: float | None = None
    finished: bool = False
    tokens: int = 0  # generated
    text: str = ""
    meta_info: dict[str, Any] = field(default_factory=dict)  # of the last output

    @property
    def state(self) -> str:
        if self.finished:
            return "done"
        return "waiting" if self.first_token is None else "decoding"

    @property
    def compression(self) -> dict[str, Any]:
        """`meta_info["kv_compression"]`: empty until the request is finished."""
        found: dict[str, Any] = self.meta_info.get("kv_compression", {})
        return found

    def update(self, output: Mapping[str, Any], seconds: float) -> None:
        """Take in one streamed output of `/generate`. Raises LoadError if it is an error."""
        if "error" in output:
            raise LoadError(str(output["error"].get("message", output["error"])))
        self.meta_info = dict(output["meta_info"])
        self.text = output["text"]
        reason = self.meta_info.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise LoadError(str(reason.get("message", "aborted")))
        tokens = int(self.meta_info["completion_tokens"])
        if tokens > self.tokens:
            self.tokens = tokens
            self.last_token = seconds
            if self.first_token is None:
                self.first_token = seconds


@dataclass(frozen=True)
class LoadProgress:
    """What a run looks like at one moment; as a string, one line."""

    seconds: float
    requests: Sequence[RequestTrace]
    used_slots: int

    def count(self, state: str) -> int:
        """Requests that are in `state`, one of STATES."""
        return sum(request.state == state for request in self.requests)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(state)} {state}" for state in STATES)
        return f"{self.seconds:.0f} s: {counts}; {self.used_slots:,} slots held"


@dataclass(frozen=True)
class ConcurrencyResult:
    """What a run came to.

    `peak_decoding` is exact: the most requests whose spans from the first to the last token
    overlap. `peak_used_slots` is sampled: slots that a request holds, from SGLang's `/v1/loads`
    (`num_used_tokens`); entries of the radix tree that nothing holds are free for the taking and
    not counted.
    """

    peak_decoding: int
    peak_used_slots: int
    seconds: float
    responses: tuple[RequestTrace, ...]

    @property
    def retractions(self) -> int:
        """Times that a request had to give its slots back and start again."""
        return sum(int(r.meta_info.get("num_retractions") or 0) for r in self.responses)

    @property
    def generated_tokens(self) -> int:
        return sum(response.tokens for response in self.responses)


def measure_concurrency(
    url: str,
    prompts: Sequence[Sequence[int]],
    *,
    kv_compression: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    ignore_eos: bool = False,
    on_progress: Callable[[LoadProgress], None] | None = None,
    timeout_seconds: float = 1800,
) -> ConcurrencyResult:
    """Send all prompts at once to `url`, greedy and streaming, and wait for all answers.

    prompts: token ids. kv_compression: settings of every request. on_progress: called every 0.2 s,
    and once at the end, with the same list of requests, which goes on changing. timeout_seconds:
    the longest silence on a stream. Raises LoadError or httpx.HTTPError at the first request that
    fails; the others are dropped, which aborts them.
    """
    sampling = {"ignore_eos": ignore_eos}
    bodies = [
        generate_body(prompt, max_new_tokens, kv_compression, sampling=sampling)
        for prompt in prompts
    ]
    return asyncio.run(_Run(url, bodies, on_progress, timeout_seconds).measure())


def peak_overlap(spans: Iterable[tuple[float, float]]) -> int:
    """The most of the spans [start, end) that hold one moment in common."""
    edges = []
    for start, end in spans:
        if start < end:
            edges += [(start, 1), (end, -1)]
    now = peak = 0
    # At equal times an end sorts first: what starts there is its successor.
    for _, step in sorted(edges):
        now += step
        peak = max(peak, now)
    return peak


class _Run:
    def __init__(
        self,
        url: str,
        bodies: Sequence[Mapping[str, Any]],
        on_progress: Callable[[LoadProgress], None] | None,
        timeout_seconds: float,
    ):
        self.bodies = bodies
        self.requests = [RequestTrace() for _ in bodies]
        self.on_progress = on_progress
        self.used_slots = self.peak_used_slots = 0
        self.started = 0.0
        self.client = AsyncServerClient(url, timeout_seconds)

    async def measure(self) -> ConcurrencyResult:
        self.started = time.perf_counter()
        async with self.client:
            sampler = asyncio.create_task(self._sample())
            try:
                pairs = zip(self.bodies, self.requests, strict=True)
                await asyncio.gather(*(self._stream(*pair) for pair in pairs))
            finally:
                sampler.cancel()
                with suppress(asyncio.CancelledError):
                    await sampler
        seconds = self._seconds()
        self._report()
        spans = [
            (r.first_token, r.last_token)
            for r in self.requests
            if r.first_token is not None and r.last_token is not None
        ]
        return ConcurrencyResult(
            peak_overlap(spans), self.peak_used_slots, seconds, tuple(self.requests)
        )

    async def _stream(self, body: Mapping[str, Any], request: RequestTrace) -> None:
        try:
            async for output in self.client.stream(body):
                request.update(output, self._seconds())
        except httpx.HTTPStatusError as error:
            raise LoadError(str(error)) from None
        request.finished = True

    async def _sample(self) -> None:
        while True:
            loads = await self.client.loads()
            self.used_slots = sum(int(load["num_used_tokens"]) for load in loads)
            self.peak_used_slots = max(self.peak_used_slots, self.used_slots)
            self._report()
            await asyncio.sleep(SAMPLE_SECONDS)

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(LoadProgress(self._seconds(), self.requests, self.used_slots))

    def _seconds(self) -> float:
        return time.perf_counter() - self.started
