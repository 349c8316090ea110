# SPDX-License-Identifier: Apache-2.0
"""Invariant 3: 200 mixed requests with aborts, retractions and flushes leak nothing.

A small pool, forced retractions, SGLang's checks of every slot's owner after every step.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import (
    assert_no_leak,
    generate,
    generate_all,
    info,
    metric,
    stats,
    stream_events,
)
from tests.e2e.conftest import StartServer
from tests.e2e.prompts import cut

REQUESTS = 200
POOL = 4096
RETRACT_EVERY = 7  # forward passes

Send = Callable[[str, list[int], dict[str, Any], random.Random], str]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "64"),
        *("--max-total-tokens", str(POOL), "--chunked-prefill-size", "256"),
        env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": str(RETRACT_EVERY)},
    ) as running:
        yield running


def plain(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    count = rng.randint(2, 24)
    response = generate(url, prompt, count, settings)
    assert len(response["output_ids"]) == count
    return str(info(response)["status"])


def one_token(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    response = generate(url, prompt, 1, settings)
    assert len(response["output_ids"]) == 1
    return str(info(response).get("reason"))


def parallel_sampling(
    url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random
) -> str:
    responses: Any = generate(url, prompt, 8, settings, sampling={"n": 2, "temperature": 0.8})
    assert [len(response["output_ids"]) for response in responses] == [8, 8]
    return "sampled"


def grammar(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    constraint = {"regex": "(yes|no), [0-9]{3}", "ignore_eos": False}
    response = generate(url, prompt, 24, settings, sampling=constraint)
    answer, number = response["text"].split(", ")
    assert answer in ("yes", "no") and len(number) == 3 and number.isdigit()
    return "grammar"


def logprobs(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    response = generate(url, prompt, 6, settings, return_logprob=True, logprob_start_len=0)
    assert len(response["meta_info"]["input_token_logprobs"]) == len(prompt)
    assert len(response["meta_info"]["output_token_logprobs"]) == 6
    return "logprobs"


def stream(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    chunks = list(stream_events(url, prompt, settings, 12))
    assert chunks[-1]["meta_info"]["completion_tokens"] == 12
    assert "status" in chunks[-1]["meta_info"]["kv_compression"]
    return "streamed"


def disconnect(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    """Leaves in prefill or in decode: SGLang aborts the request."""
    for _ in islice(stream_events(url, prompt, settings, 200), rng.choice([1, 2, 8])):
        pass
    return "disconnected"


def abort_by_id(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    rid = f"abort-{rng.random()}"
    events = stream_events(url, prompt, settings, 200, rid=rid)
    next(events)
    httpx.post(f"{url}/abort_request", json={"rid": rid}, timeout=60)
    last = list(events)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    return "aborted"


def refused(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    response = generate(url, prompt, 4, {"budget": -2})
    assert "kv_compression.budget=-2" in response["error"]["message"]
    return "refused"


def flush(url: str, prompt: list[int], settings: dict[str, Any], rng: random.Random) -> str:
    httpx.post(f"{url}/flush_cache", timeout=60)  # refused while requests run
    return "flushed"


KINDS: list[Send] = [plain] * 6 + [disconnect] * 2 + [stream, abort_by_id, grammar, logprobs]
KINDS += [parallel_sampling, one_token, refused, flush]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"budget": 0.5},
    {"budget": 0.1},
    {"budget": 40},
    {"method": "adakv"},
    {"method": "pyramidkv"},
    {"method": "snapkv"},
    {"method": "streamingllm"},
    {"method": "random", "budget": 0.3},
    {"enabled": False},
    {"budget": 1.0},
]


def test_a_storm_of_requests_leaks_nothing(server: Server, tokens: list[int]) -> None:
    rng = random.Random(0)
    probes = cut(tokens, [260, 330], 80_000)
    document, rest = tokens[81_000:81_200], 82_000

    def answers() -> list[list[int]]:
        server.flush_cache()
        settings: list[dict[str, Any]] = [{"budget": 0.25}, {"enabled": False}]
        pairs = zip(probes, settings, strict=True)
        return [generate(server.url, p, 12, s)["output_ids"] for p, s in pairs]

    def one(number: int) -> str:
        own = random.Random(number)
        length = own.choice([40, 90, 150, 220, 320, 500])
        prompt = tokens[rest + number * 100 : rest + number * 100 + length]
        if number % 3 == 0:
            prompt = document + prompt[:length]
        return own.choice(KINDS)(server.url, prompt, own.choice(SETTINGS), own)

    before = answers()
    numbers = list(range(REQUESTS))
    rng.shuffle(numbers)
    with ThreadPoolExecutor(10) as pool:
        outcomes = Counter(pool.map(one, numbers))
    print(dict(outcomes), stats(server.url))
    retracted = metric(server.url, "sglang:num_retracted_requests_total")
    print(f"{retracted:.0f} retractions")
    assert sum(outcomes.values()) == REQUESTS
    assert retracted >= 10
    assert outcomes["compressed"] >= 20 and outcomes["disconnected"] >= 10
    assert stats(server.url)["requests"]["compressed"] >= 50
    assert answers() == before
    assert_no_leak(server.url)
    server.flush_cache()
    assert_no_leak(server.url)


def test_retracted_request_is_compressed_again(server: Server, tokens: list[int]) -> None:
    """The exact prompt it left in the tree is its own, not a shared prefix."""
    server.flush_cache()
    prompts = cut(tokens, [400, 300, 200], 104_000)
    before = stats(server.url)["requests"]
    responses = generate_all(server.url, prompts, 60, [{"budget": 64}] * len(prompts))
    after = stats(server.url)["requests"]
    retractions = [response["meta_info"]["num_retractions"] for response in responses]
    print(f"retractions: {retractions}")
    assert sum(retractions) >= 1
    for response in responses:
        assert info(response)["status"] == "compressed"
        assert info(response)["shared_prefix_tokens"] == 0
    assert after["compressed"] == before["compressed"] + len(prompts) + sum(retractions)
    assert after["skipped"] == before["skipped"]
