# SPDX-License-Identifier: Apache-2.0
"""A thousand random arrivals at SGLang's own scheduler, with a ladder of budgets in a small pool.

The model is a random Llama of two small layers: what it says means nothing, but every request goes
through the real server, tree and pool. SGLang checks after each step that no slot leaks.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import assert_no_leak, info, stats
from tests.e2e.conftest import StartServer

POOL = 3072  # slots
LADDER = (1, 0.5, 0.25, 0.125)
CHUNK = 512
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("model")
    Path(model, "config.json").write_text(json.dumps(MODEL))
    with start_server(
        *("--load-format", "dummy", "--skip-tokenizer-init"),
        *("--max-total-tokens", str(POOL), "--chunked-prefill-size", str(CHUNK)),
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "128"),
        *("--kv-compression-budget", ",".join(map(str, LADDER))),
        *("--kv-compression-config", json.dumps({"scope": "auto", "admit_ahead": True})),
        model=model,
    ) as running:
        yield running


class Arrival(NamedTuple):
    prompt: list[int]
    max_new_tokens: int
    gives_up: bool = False  # the client hangs up while the answer is streamed
    enabled: bool = True


Answer = dict[str, Any] | None
"""The last message of the stream; None if the client hung up."""


def arrivals(count: int, rng: random.Random) -> list[Arrival]:
    """Short and long prompts, a third of them over one of five shared documents."""
    documents = [random_tokens(rng, rng.randrange(100, 800)) for _ in range(5)]
    made = []
    for _ in range(count):
        prompt = random_tokens(rng, rng.choice([20, 150, 400, 900, 1600]) + rng.randrange(100))
        if rng.random() < 0.33:
            prompt = rng.choice(documents) + prompt[:300]
        made.append(Arrival(prompt, rng.choice([1, 4, 12, 40]), rng.random() < 0.03))
    return made


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 1000) for _ in range(length)]


class Client:
    """Streams answers from a server, `in_flight` of a load at a time."""

    def __init__(self, http: httpx.AsyncClient, in_flight: int, rng: random.Random):
        self.http, self.rng = http, rng
        self.gate = asyncio.Semaphore(in_flight)

    async def messages(self, arrival: Arrival) -> AsyncIterator[dict[str, Any]]:
        sampling = {
            "max_new_tokens": arrival.max_new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "custom_params": {"kv_compression": {"enabled": arrival.enabled}},
        }
        body = {"input_ids": arrival.prompt, "sampling_params": sampling, "stream": True}
        async with self.http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    async def started(self, arrival: Arrival) -> AsyncIterator[dict[str, Any]]:
        """Returns once its first token is here, with the messages that follow."""
        messages = self.messages(arrival)
        await anext(messages)
        return messages

    async def send(self, arrival: Arrival) -> Answer:
        messages = self.messages(arrival)
        if arrival.gives_up:
            await anext(messages)
            await messages.aclose()
            return None
        return await last(messages)

    async def serve(self, load: list[Arrival]) -> list[Answer]:
        """All of `load`, each a random moment after a place is free."""

        async def one(arrival: Arrival) -> Answer:
            async with self.gate:
                await asyncio.sleep(self.rng.expovariate(50))
                return await self.send(arrival)

        return await asyncio.gather(*map(one, load))


async def last(messages: AsyncIterator[dict[str, Any]]) -> Answer:
    found = None
    async for message in messages:
        found = message
    return found


@asynccontextmanager
async def client(url: str, in_flight: int, rng: random.Random) -> AsyncIterator[Client]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=500, limits=limits) as http:
        yield Client(http, in_flight, rng)


def checked(load: list[Arrival], answers: list[Answer]) -> Counter[str]:
    """Every request has its answer, of the length it asked for. Returns how each was served."""
    outcomes: Counter[str] = Counter()
    for arrival, answer in zip(load, answers, strict=True):
        assert (answer is None) == arrival.gives_up
        if answer is None:
            continue
        assert answer["meta_info"]["completion_tokens"] == arrival.max_new_tokens, answer
        assert answer["meta_info"]["prompt_tokens"] == len(arrival.prompt)
        found = info(answer)
        outcomes[found.get("reason", "compressed")] += 1
        if found["status"] == "compressed":
            assert 33 <= found["kept_tokens"] < found["suffix_tokens"]
    return outcomes


# Alone in the pool a prompt of FIRST tokens is exact: with its first copy and all of its answer it
# would hold FIRST + FIRST / 2 + ANSWER = 3,040 slots. One of SECOND tokens is then admitted if the
# pool's 3,072 hold at once
#   SECOND + 163 + 1 = 1,464: its prompt, its smallest copy (an eighth), a page that SGLang adds;
#   FIRST / 2 = 880: room for the first one's first copy, kept for all of the pass that finds it
#       exact, also once that copy is made;
#   the first one's rung, and the n tokens that it has answered.
# With the first on its second rung (880) these are 3,224 + n, too many; on its third (440) they are
# 2,784 + n, which fit up to n = 288; on its last (220) 2,564 + n, which fit to the answer's end.
FIRST, ANSWER, SECOND = 1760, 400, 1300


async def wave(url: str, load: list[Arrival], rng: random.Random) -> list[Answer]:
    """One request, one that it must go down the ladder for while it decodes, then all of `load`."""
    first, second, *others = load
    async with client(url, 24, rng) as sender:
        steps_down = await sender.started(first)
        admitted = await sender.started(second)
        answers = await asyncio.gather(last(steps_down), last(admitted), sender.serve(others))
        return [*answers[:2], *answers[2]]


def test_a_thousand_arrivals_are_all_answered_and_nothing_leaks(server: Server) -> None:
    rng = random.Random(0)
    waves = 10
    outcomes: Counter[str] = Counter()
    for _ in range(waves):
        server.flush_cache()
        first = Arrival(random_tokens(rng, FIRST), ANSWER)
        load = [first, Arrival(random_tokens(rng, SECOND), 4), *arrivals(98, rng)]
        answers = asyncio.run(wave(server.url, load, rng))
        outcomes += checked(load, answers)
        assert answers[0] is not None and info(answers[0])["kept_tokens"] <= FIRST * LADDER[2]
    found = stats(server.url)
    assert outcomes["compressed"] >= waves and found["trims"] >= waves, (outcomes, found)
    assert_no_leak(server.url)


def test_a_ladder_is_exact_at_low_load_and_lowest_at_high_load(server: Server) -> None:
    """The same prompts, one at a time and then all at once.

    All at once: they wait together for a request that leaves no room for any, 1,200 slots and 150
    for its copy. Then 9 find room before one has finished, holding 150 and 40 each; and with 12
    running or waiting none but the last can have more than the lowest rung.
    """
    server.flush_cache()
    rng = random.Random(1)
    load = [Arrival(random_tokens(rng, 1200), 40) for _ in range(12)]

    async def alone() -> list[Answer]:
        async with client(server.url, 1, rng) as sender:
            return await sender.serve(load)

    async def together() -> list[Answer]:
        async with client(server.url, len(load), rng) as sender:
            blocker = Arrival(random_tokens(rng, 1800), 1000, enabled=False)
            blocking = await sender.started(blocker)
            answers, blocked = await asyncio.gather(sender.serve(load), last(blocking))
            checked([blocker], [blocked])
            return answers

    assert checked(load, asyncio.run(alone())) == {"no_pressure": len(load)}
    server.flush_cache()
    answers = asyncio.run(together())
    checked(load, answers)
    kept = Counter(info(answer).get("kept_tokens", 1200) for answer in answers if answer)
    assert kept[150] >= 9, kept
    assert_no_leak(server.url)
