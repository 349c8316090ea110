# SPDX-License-Identifier: Apache-2.0
"""A thousand random arrivals at SGLang's own scheduler, with a ladder of budgets in a small pool.

The model is a random Llama of two small layers: what it says means nothing, but every request goes
through the real server, tree and pool. SGLang checks after each step that no slot leaks.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from lava_sglang.server_process import Server
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
    gives_up: bool  # the client hangs up while the answer is streamed


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


async def send(client: httpx.AsyncClient, url: str, arrival: Arrival) -> dict[str, Any] | None:
    """The last message of the stream; None if the client hung up."""
    sampling = {"max_new_tokens": arrival.max_new_tokens, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": arrival.prompt, "sampling_params": sampling, "stream": True}
    last: dict[str, Any] = {}
    async with client.stream("POST", f"{url}/generate", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
                if arrival.gives_up:
                    return None
    return last


async def serve(
    url: str, load: list[Arrival], in_flight: int, rng: random.Random
) -> list[dict[str, Any] | None]:
    """All of `load`, `in_flight` at a time, each a random moment after a place is free."""
    gate = asyncio.Semaphore(in_flight)
    limits = httpx.Limits(max_connections=in_flight)

    async def one(client: httpx.AsyncClient, arrival: Arrival) -> dict[str, Any] | None:
        async with gate:
            await asyncio.sleep(rng.expovariate(50))
            return await send(client, url, arrival)

    async with httpx.AsyncClient(timeout=500, limits=limits) as client:
        return await asyncio.gather(*(one(client, arrival) for arrival in load))


def checked(load: list[Arrival], answers: list[dict[str, Any] | None]) -> Counter[str]:
    """Every request has its answer, of the length it asked for. Returns how each was served."""
    outcomes: Counter[str] = Counter()
    for arrival, answer in zip(load, answers, strict=True):
        assert (answer is None) <= arrival.gives_up
        if answer is None:
            continue
        assert answer["meta_info"]["completion_tokens"] == arrival.max_new_tokens, answer
        assert answer["meta_info"]["prompt_tokens"] == len(arrival.prompt)
        found = info(answer)
        outcomes[found.get("reason", "compressed")] += 1
        if found["status"] == "compressed":
            assert 33 <= found["kept_tokens"] < found["suffix_tokens"]
    return outcomes


def test_a_thousand_arrivals_are_all_answered_and_nothing_leaks(server: Server) -> None:
    rng = random.Random(0)
    load = arrivals(1000, rng)
    answers = asyncio.run(serve(server.url, load, 24, rng))
    outcomes = checked(load, answers)
    found = stats(server.url)
    print(dict(outcomes), found)
    assert outcomes["compressed"] > 100 and found["trims"] > 10
    assert_no_leak(server.url)


def test_a_ladder_is_exact_at_low_load_and_lowest_at_high_load(server: Server) -> None:
    """The same prompts, one at a time and then all at once."""
    server.flush_cache()
    rng = random.Random(1)
    load = [Arrival(random_tokens(rng, 1200), 40, False) for _ in range(12)]
    alone = asyncio.run(serve(server.url, load, 1, rng))
    assert checked(load, alone) == {"no_pressure": len(load)}
    server.flush_cache()
    together = asyncio.run(serve(server.url, load, len(load), rng))
    outcomes = checked(load, together)
    kept = Counter(info(answer).get("kept_tokens", 1200) for answer in together if answer)
    print(dict(outcomes), dict(kept))
    assert outcomes["compressed"] >= len(load) - 2
    assert kept[150] >= len(load) // 2, "most are on the lowest rung"
    assert_no_leak(server.url)
