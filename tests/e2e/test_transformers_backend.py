# SPDX-License-Identifier: Apache-2.0
"""A model that SGLang runs by transformers' own code, and sessions, whose turns stay exact.

One server of a small random Granite, whose attention has a scale of its own; a ladder, and a pool
in which slots run short.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import Response, assert_no_leak, generate, generate_all, info, stats
from tests.e2e.conftest import MAX_NEW_TOKENS, WINDOW, StartServer
from tests.oracle import Oracle, assert_same_tokens
from tests.oracle_keep import KEEP
from tests.unit.tiny_llama import random_tokens, write_tiny_granite
from tests.unit.tiny_tokenizer import write_tiny_tokenizer

LENGTHS = [110, 150, 190, 230, 300, 520, 900]  # tokens
METHODS = ["lava", "snapkv", "lava_span"]
POOL = 2048  # slots


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("granite")
    write_tiny_tokenizer(path)
    return write_tiny_granite(path, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def server(start_server: StartServer, model: Path) -> Iterator[Server]:
    with start_server(
        *("--model-impl", "transformers", "--kv-compression", "lava"),
        *("--kv-compression-budget", "0.5,0.25,0.125", "--kv-compression-min-tokens", "100"),
        *("--enable-streaming-session", "--enable-session-radix-cache"),
        *("--max-total-tokens", str(POOL), "--chunked-prefill-size", "256"),
        model=model,
    ) as running:
        yield running
        assert_no_leak(running.url)


def check(oracle: Oracle, prompt: list[int], response: Response, method: str | None) -> None:
    """method: None where the prompt is exact."""
    found = info(response)
    prefill = oracle.prefill(prompt, WINDOW)
    keep = None
    if method is not None:
        assert found["status"] == "compressed"
        keep = KEEP[method](prefill, found["shared_prefix_tokens"], found["kept_tokens"], WINDOW)
    said = response["output_ids"]
    excused = assert_same_tokens(oracle.greedy(prefill, keep, len(said), force=said), said)
    print(len(prompt), method, [f"step {step}: {gap:.1e}" for step, gap in excused])


def test_text_is_the_oracles(server: Server, oracle: Oracle) -> None:
    prompts = [random_tokens(length, length) for length in LENGTHS]
    methods, budgets = cycle(METHODS), cycle([0.25, 64])
    settings: list[Any] = [{"method": next(methods), "budget": next(budgets)} for _ in prompts]
    settings[-1] = {"enabled": False}
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    for prompt, chosen, response in zip(prompts, settings, responses, strict=True):
        check(oracle, prompt, response, chosen.get("method"))


def open_session(url: str, **fields: Any) -> str:
    body = {"capacity_of_str_len": 100_000, **fields}
    session: str = httpx.post(f"{url}/open_session", json=body, timeout=60).json()
    return session


@pytest.mark.parametrize("kind", ["session", "streaming session", "session of the radix cache"])
def test_a_turn_of_a_session_is_exact_and_counted(
    server: Server, oracle: Oracle, kind: str
) -> None:
    """Other requests are compressed meanwhile, and shrink for it."""
    server.flush_cache()
    before = stats(server.url)["requests"]
    streaming, by_name = kind == "streaming session", kind == "session of the radix cache"
    session = "a name" if by_name else open_session(server.url, streaming=streaming)
    seed = len(kind)
    others = [random_tokens(400, seed + 10 + i) for i in range(6)]
    said: list[int] = []
    last = None
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(generate_all, server.url, others, 150, parallel=6)
        for turn in range(3):
            new = random_tokens(260, seed + turn)
            said += new
            if by_name:
                fields: dict[str, Any] = {"session_id": session}
            else:
                rid = None if streaming else last
                fields = {"session_params": {"id": session, "rid": rid}}
            response = generate(server.url, said if by_name else new, MAX_NEW_TOKENS, **fields)
            assert info(response)["reason"] == "session"
            assert info(response)["prompt_tokens"] == len(said)
            check(oracle, said, response, None)
            said += response["output_ids"]
            last = response["meta_info"]["id"]
        compressed = [info(response)["status"] for response in rest.result()]
    assert compressed == ["compressed"] * len(others)
    if not by_name:
        httpx.post(f"{server.url}/close_session", json={"session_id": session}, timeout=60)
    after = stats(server.url)["requests"]
    turns = after["skipped"]["session"] - before["skipped"].get("session", 0)
    assert turns >= 3  # one that is retracted counts at each prefill
    assert_no_leak(server.url)
