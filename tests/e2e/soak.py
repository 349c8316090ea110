# SPDX-License-Identifier: Apache-2.0
"""Everything at once, for as long as you like: servers under mixed traffic, and what they lose.

    make soak ARGS="--minutes 60"

Clients send long and short prompts, chats, documents with questions, repeats, samples, beams,
streams that they leave, settings of all kinds and bad ones; the tree is flushed, generation paused
with everything retracted. Each server runs SGLang's strict checks of its slots after every step.
Counted: servers that died, slots that leaked, answers that are not the independent oracle's.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from lava_sglang.tools.client import ServerClient, events
from lava_sglang.tools.machine import machine_line
from lava_sglang.tools.server_process import Server, machine_options
from tests.e2e.client import replica_stats
from tests.e2e.prompts import prose_tokens
from tests.e2e.request_fuzzer import request as odd_request
from tests.oracle import Oracle, assert_same_tokens
from tests.oracle_keep import KEEP

WINDOW = 32
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


class Kind(NamedTuple):
    """A server.

    fixed: its compressed answers are those of one choice, made after the prefill. beams: whether
    SGLang serves beam search there.
    """

    name: str
    options: tuple[str, ...]
    config: dict[str, Any]
    fixed: bool = False
    beams: bool = True


KINDS = (
    Kind(
        "lava_span, scope auto, chunks of 256",
        ("--kv-compression", "lava_span", "--chunked-prefill-size", "256"),
        {"scope": "auto"},
        fixed=True,
    ),
    Kind(
        "lava, ladder 0.5,0.25,0.125, scope prompt, decode_interval 48",
        ("--kv-compression", "lava", "--kv-compression-budget", "0.5,0.25,0.125"),
        {"scope": "prompt", "decode_interval": 48},
    ),
    Kind(
        "adakv under pressure, pages of 16, decode steps between chunks",
        (
            *("--kv-compression", "adakv", "--page-size", "16"),
            *("--chunked-prefill-size", "256", "--prefill-decode-interval", "2"),
        ),
        {"trigger": "pressure"},
        beams=False,
    ),
    Kind(
        "snapkv, scope suffix, lpm",
        ("--kv-compression", "snapkv", "--schedule-policy", "lpm"),
        {"scope": "suffix", "admit_ahead": True},
        fixed=True,
    ),
)


@dataclass
class Answered:
    """A greedy answer that an oracle can check."""

    prompt: list[int]
    output_ids: list[int]
    info: dict[str, Any]
    retractions: int


@dataclass
class Report:
    """What one server did."""

    kind: str
    seconds: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    retractions: int = 0
    trims: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    leaked_slots: int = 0


class Traffic:
    """What the clients of one server send. Thread-safe by a lock on what they share."""

    def __init__(
        self, url: str, tokens: Sequence[int], seed: int, report: Report, beams: bool = True
    ) -> None:
        self.url = url
        self.tokens = tokens
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        # SGLang 0.5.23 itself ends the scheduler if a beam runs when generation is paused so.
        self.beam_or_pause = threading.Lock()
        self.report = report
        self.beams = beams
        self.answered: list[Answered] = []
        self.documents = [self._text(random.Random(seed + i).randrange(200, 700)) for i in range(4)]
        self.recent: list[list[int]] = [*self.documents]
        self.http = httpx.Client(base_url=url, timeout=900, trust_env=False)

    def _text(self, count: int) -> list[int]:
        start = self.rng.randrange(len(self.tokens) - count)
        return list(self.tokens[start : start + count])

    def one(self) -> None:
        """One action of one client."""
        actions = {
            self.ask: 60, self.leave_a_stream: 10, self.samples: 4, self.beam: 3 * self.beams,
            self.odd: 14, self.chat_route: 6, self.flush: 1, self.pause: 1,
        }  # fmt: skip
        with self.lock:
            action = self.rng.choices([*actions], [*actions.values()])[0]
            self.report.sent[action.__name__] += 1
        try:
            action()
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            with self.lock:
                self.report.problems.append(f"{action.__name__}: {type(error).__name__} {error}")

    def prompt(self) -> list[int]:
        with self.lock:
            kind = self.rng.random()
            if kind < 0.3:
                made = self.rng.choice(self.documents) + self._text(self.rng.randrange(20, 250))
            elif kind < 0.5:
                made = self.rng.choice(self.recent) + self._text(self.rng.randrange(5, 150))
            elif kind < 0.6:
                made = [*self.rng.choice(self.recent)]
            else:
                made = self._text(self.rng.choice([30, 120, 300, 500, 900]))
            made = made[:1200]
            self.recent = [*self.recent[-12:], made]
            return made

    def settings(self) -> dict[str, Any] | None:
        with self.lock:
            return self.rng.choice(
                [None, None, None, {"enabled": False}, {"budget": 0.3}, {"budget": 60}]
            )

    def body(self, **sampling: Any) -> dict[str, Any]:
        settings = self.settings()
        custom = {} if settings is None else {"custom_params": {"kv_compression": settings}}
        with self.lock:
            new = self.rng.choice([1, 4, 12, 24, 90])
        parameters = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return {"input_ids": self.prompt(), "sampling_params": parameters | custom | sampling}

    def ask(self) -> None:
        body = self.body()
        answer = self._post("/generate", body)
        meta = answer["meta_info"]
        found = Answered(
            body["input_ids"],
            answer["output_ids"],
            meta["kv_compression"],
            meta.get("num_retractions") or 0,
        )
        assert len(found.output_ids) == body["sampling_params"]["max_new_tokens"], found.info
        with self.lock:
            self.answered.append(found)
            self.report.retractions += found.retractions
            self.report.outcomes[found.info.get("reason", found.info["status"])] += 1
            self.recent = [*self.recent[-12:], [*found.prompt, *found.output_ids][:1100]]

    def leave_a_stream(self) -> None:
        with self.lock:
            stays = self.rng.randrange(6)
        body = {**self.body(max_new_tokens=60), "stream": True}
        with self.http.stream("POST", "/generate", json=body) as response:
            for count, _ in enumerate(events(response.iter_lines())):
                if count >= stays:
                    return

    def samples(self) -> None:
        answers = self._post("/generate", self.body(n=3, temperature=0.8, max_new_tokens=8))
        assert len(answers) == 3

    def beam(self) -> None:
        with self.beam_or_pause:
            answer = self._post("/generate", self.body(beam_width=2, n=2, max_new_tokens=12))
        assert len(answer["meta_info"]["beam_results"]) == 2

    def odd(self) -> None:
        with self.lock:
            route, body = odd_request(self.rng)
        headers = {"Content-Type": "application/json"}
        response = self.http.post(route, content=json.dumps(body), headers=headers)
        assert response.status_code in (200, 400, 422), f"{route}: {response.status_code}"

    def chat_route(self) -> None:
        body = {
            "model": "demo",
            "max_tokens": 8,
            "messages": [{"role": "user", "content": "Tell me about the sea. " * 40}],
            "custom_params": {"kv_compression": self.settings() or {}},
            "stream": True,
        }
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert sum(1 for _ in events(response.iter_lines())) > 1

    def flush(self) -> None:
        """Refused while something runs, which is as well."""
        self.http.post("/flush_cache")

    def pause(self) -> None:
        """All that runs is retracted, and goes on."""
        with self.beam_or_pause:
            self._post("/pause_generation", {"mode": "retract"})
            time.sleep(0.2)
            self._post("/continue_generation", {})

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        response = self.http.post(route, json=body)
        assert response.status_code == 200, f"{response.status_code}: {response.text[:300]}"
        return response.json()


def run_traffic(traffic: Traffic, seconds: float, clients: int, most: int | None = None) -> None:
    """Until the time is up or `most` actions were taken. Then everything has been answered."""
    deadline = time.monotonic() + seconds
    left = threading.Semaphore(most) if most is not None else None

    def client() -> None:
        while time.monotonic() < deadline and (left is None or left.acquire(blocking=False)):
            traffic.one()

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()


def check_idle(url: str, report: Report) -> None:
    """Once nothing runs, free and evictable slots are the pool."""
    for _ in range(120):
        (stats,) = replica_stats(url)
        lost = stats["pool_slots"] - stats["free_slots"] - stats["evictable_slots"]
        if lost == 0 and stats["running_compressed_requests"] == 0:
            break
        time.sleep(1)
    report.leaked_slots = lost
    report.trims = stats["trims"]


def checkable(answered: Sequence[Answered], fixed: bool) -> Iterator[Answered]:
    """Exact answers, and compressed ones whose entries were chosen once, of the prompt."""
    for one in answered:
        once = fixed and one.retractions == 0 and one.info.get("method") in KEEP
        if one.info["status"] == "skipped" or once:
            yield one


def compare(oracle: Oracle, one: Answered, report: Report) -> None:
    prefill = oracle.prefill(one.prompt, min(WINDOW, len(one.prompt)))
    keep = None
    if one.info["status"] == "compressed":
        kept = one.info["kept_tokens"]
        keep = KEEP[one.info["method"]](prefill, one.info["shared_prefix_tokens"], kept, WINDOW)
    steps = oracle.greedy(prefill, keep, len(one.output_ids), force=one.output_ids)
    report.compared[one.info["status"]] += 1
    try:
        report.near_ties += len(assert_same_tokens(steps, one.output_ids))
    except AssertionError as error:
        report.wrong.append(f"{len(one.prompt)} tokens, {one.info}: {error}")


def soak(
    kind: Kind, model_path: str, oracle: Oracle, tokens: Sequence[int], arguments: Any, seed: int
) -> Report:
    report = Report(kind.name)
    options = ["--model-path", model_path, *machine_options(), "--enable-metrics", *kind.options]
    options += ["--max-running-requests", "64", "--max-total-tokens", str(arguments.slots)]
    options += ["--kv-compression-min-tokens", "100"]
    options += ["--kv-compression-config", json.dumps(kind.config)]
    started = time.monotonic()
    with Server(options, env=STRICT) as server:
        traffic = Traffic(server.url, tokens, seed, report, kind.beams)
        run_traffic(traffic, 60 * arguments.minutes / len(KINDS), arguments.clients)
        with ServerClient(server.url) as client:
            if client.is_ready():
                check_idle(server.url, report)
            else:
                report.problems.append("the server is dead")
        died = [line for line in server.log_tail(2000) if "Scheduler hit an exception" in line]
        report.problems += died
    report.seconds = time.monotonic() - started
    found = [*checkable(traffic.answered, kind.fixed)]
    random.Random(seed).shuffle(found)
    for one in found[: arguments.compare]:
        compare(oracle, one, report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.soak", description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of traffic (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at once (%(default)s)")
    parser.add_argument("--slots", type=int, default=4096, help="of each pool (%(default)s)")
    parser.add_argument("--compare", type=int, default=150, help="answers a server (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    arguments = parser.parse_args()
    oracle = Oracle(arguments.model_path)
    tokens = prose_tokens(oracle.tokenizer)
    reports = []
    for i, kind in enumerate(KINDS):
        report = soak(kind, arguments.model_path, oracle, tokens, arguments, arguments.seed + i)
        reports.append(report)
        print(json.dumps(vars(report), indent=2), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([vars(r) for r in reports], indent=2) + "\n")
    total = sum(sum(report.sent.values()) for report in reports)
    bad = sum(len(report.wrong) + len(report.problems) + report.leaked_slots for report in reports)
    print(f"{total} requests, {bad} faults; {machine_line()}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
