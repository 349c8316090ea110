# SPDX-License-Identifier: Apache-2.0
"""Random traffic through SGLang's own scheduler loop, every slot checked after every step.

    LAVA_FUZZ_SEEDS=0-999 make test ARGS=tests/contract/test_scheduler_fuzzer.py

A seed is a server (method, ladder or pressure, scope, interval of answers, page size, chunks,
decode steps between chunks, overlap, slots) and what its clients do: documents with questions,
chats, repeats, settings of their own, beams, aborts, pauses that retract, flushes. In the end
every request is answered or refused in words, and no slot is lost. A failure names its seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.managers.request import LavaReq
from lava_sglang.methods import METHOD_CHOICES
from tests.contract.scheduling import Served

TURNS = 40

pytestmark = pytest.mark.usefixtures("runtime_context")


FOUND = (127, 207)
"""Seeds that failed: a fixed-length answer that never fits without a tree waited for ever."""


def seeds() -> list[int]:
    """First and last are in the environment, or a few that take seconds."""
    first, _, last = os.environ.get("LAVA_FUZZ_SEEDS", "0-23").partition("-")
    return [*range(int(first), int(last or first) + 1), *FOUND]


def random_config(rng: random.Random) -> KVCompressionConfig:
    """A server that starts."""
    while True:
        values: dict[str, Any] = {
            "method": rng.choice(METHOD_CHOICES[1:]),
            "budget": rng.choice([0.25, 0.5, 24, (0.5, 0.25), (1, 0.5, 0.2), (60, 30, 12)]),
            "min_tokens": rng.choice([12, 40, 120]),
            "window_size": rng.choice([4, 8]),
            "sink_tokens": 2,
            "scope": rng.choice(["suffix", "prompt", "auto"]),
            "trigger": rng.choice(["always", "always", "pressure"]),
            "decode_interval": rng.choice([None, None, 12, 30]),
            "admit_ahead": rng.random() < 0.3,
        }
        try:
            return KVCompressionConfig.parse(values)
        except KVCompressionError:
            continue


class Clients:
    """What one seed's clients send, and what they do while they wait."""

    def __init__(self, rng: random.Random, served: Served) -> None:
        self.rng = rng
        self.served = served
        slots = served.token_to_kv_pool_allocator.size
        self.documents = [self._tokens(rng.randrange(20, slots // 3)) for _ in range(3)]
        self.texts: list[list[int]] = [*self.documents]
        self.sent: list[LavaReq] = []

    def send(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            text = rng.choice(self.documents) + self._tokens(rng.randrange(1, 60))
        elif kind < 0.6:
            text = rng.choice(self.texts) + self._tokens(rng.randrange(1, 40))  # a chat's next turn
        elif kind < 0.75:
            text = [*rng.choice(self.texts)]  # sent before
        else:
            text = self._tokens(rng.randrange(1, 220))
        longest = self.served.token_to_kv_pool_allocator.size * 3 // 4
        text = text[:longest]
        self.texts = [*self.texts[-8:], text]
        params = rng.choice([None, None, None, {"enabled": False}, {"budget": 0.3}, "bad", 7])
        req = self.served.engine.request(
            text,
            self.served.engine.coordinator.config,
            max_new_tokens=rng.choice([1, 2, 8, 30, 90]),
            custom_params=None if params is None else {"kv_compression": params},
        )
        req.sampling_params.ignore_eos = rng.random() < 0.5
        self.sent.append(self.served.queue(req))

    def abort(self) -> None:
        """A client is gone: out of the queue, or ended with the next result."""
        waiting = self.served.waiting_queue
        running = [req for req in self.sent if req.kv.holds_kv and not req.finished()]
        if waiting and self.rng.random() < 0.4:
            req = self.rng.choice(waiting)
            if not req.kv.holds_kv:
                waiting.remove(req)
                req.finished_reason = FINISH_ABORT("gone")
                self.served.finished.append(req)
        elif running:
            self.rng.choice(running).to_finish = FINISH_ABORT("gone")

    def beam(self) -> None:
        """Rows without a prefill: nothing of the owners before is left in their tables."""
        rows = self.served.req_to_token_pool
        members = rows.alloc_rows(min(3, rows.available_size()))
        tape = self.served.engine.tape
        for row in members or []:
            assert not tape.budgets[row] and not tape.prefix_lens[row]
            assert not tape.position_deltas[row]
        rows.free_slots.extend(members or [])

    def flush(self) -> None:
        if self.served.nothing_runs:
            self.served.tree_cache.reset()
            self.served.token_to_kv_pool_allocator.clear()

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, 90) for _ in range(count)]


def run(seed: int) -> None:
    """Raises AssertionError, or what the scheduler raised."""
    rng = random.Random(seed)
    config = random_config(rng)
    page_size = rng.choice([1, 1, 16])
    served = Served(
        config,
        slots=rng.choice([160, 256, 512]),
        page_size=page_size,
        chunk=rng.choice([None, 48, 64]),
        decode_steps=rng.choice([0, 0, 2, 5]),
        overlap=rng.random() < 0.5,
        disable_radix_cache=rng.random() < 0.1,
        policy=rng.choice(["fcfs", "lpm"]),
    )
    clients = Clients(rng, served)
    for _ in range(TURNS):
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            clients.send()
        for _ in range(rng.randrange(1, 6)):
            served.step()
            served.check()
        what = rng.random()
        if what < 0.1:
            clients.abort()
        elif what < 0.15:
            clients.beam()
        elif what < 0.18:
            clients.flush()
        elif what < 0.21:
            served.pause()
            served.check()
    served.serve(check=True)
    answered = {id(req) for req in (*served.finished, *served.aborted)}
    assert answered == {id(req) for req in clients.sent}, f"{len(clients.sent)} requests were sent"


@pytest.mark.parametrize("seed", seeds())
def test_nothing_is_lost_and_nothing_raises(seed: int) -> None:
    run(seed)
