# SPDX-License-Identifier: Apache-2.0
"""The whole prompt compressed privately, on the settings that differ from the other module's:
pages of 16 tokens, no overlap scheduling, chunks of 256. The tests run in order."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import assert_no_leak, generate, generate_all, info
from tests.e2e.conftest import MAX_NEW_TOKENS, WINDOW, StartServer
from tests.e2e.prompts import cut
from tests.oracle import Oracle, Prefill, assert_same_tokens
from tests.oracle_keep import KEEP

PAGE = 16
STEPS = 8  # output tokens of each of the many combinations
COMBINATIONS = [
    *(
        (method, budget)
        for method in ("lava", "adakv", "pyramidkv")
        for budget in (64, 0.125, 0.25, 0.5)
    ),
    ("snapkv", 0.25),
]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100"),
        *("--kv-compression-config", '{"scope": "prompt"}'),
        *("--max-total-tokens", "24576", "--chunked-prefill-size", "256"),
        *("--page-size", str(PAGE), "--disable-overlap-schedule"),
    ) as running:
        yield running


@pytest.mark.parametrize(("method", "budget"), COMBINATIONS)
def test_compressed_text_is_the_oracles(
    server: Server,
    oracle: Oracle,
    prompts: list[list[int]],
    prefills: list[Prefill],
    method: str,
    budget: float,
) -> None:
    """Invariant 5. The first meets a cold tree and prefills in chunks; for the others the exact
    prompt is in the tree and only the observation window is prefilled, with the same outcome."""
    number = COMBINATIONS.index((method, budget))
    cold = number == 0
    if not cold:  # every other prompt, and the others with the next combination
        prompts, prefills = prompts[number % 2 :: 2], prefills[number % 2 :: 2]
    settings: list[Any] = [{"budget": budget, "method": method}] * len(prompts)
    responses = generate_all(server.url, prompts, STEPS, settings)
    compressed = 0
    for prompt, prefill, response in zip(prompts, prefills, responses, strict=True):
        found = info(response)
        if len(prompt) < 100:
            assert found["reason"] == "too_short"
            continue
        assert found["status"] == "compressed", found
        assert found["shared_prefix_tokens"] == 0
        wanted = budget if budget > 1 else math.ceil(budget * len(prompt))
        assert found["kept_tokens"] == math.ceil(max(wanted, WINDOW + 1) / PAGE) * PAGE
        cached = response["meta_info"]["cached_tokens"]
        assert cached == (0 if cold else (len(prompt) - WINDOW) // PAGE * PAGE)
        keep = KEEP[method](prefill, 0, found["kept_tokens"], WINDOW)
        steps = oracle.greedy(prefill, keep, STEPS, force=response["output_ids"])
        for step, gap in assert_same_tokens(steps, response["output_ids"]):
            print(f"{len(prompt)} tokens: step {step} differs, logit gap {gap:.2e}")
        compressed += 1
    assert compressed == (20 if cold else 10)


def test_off_for_a_request_is_stock(
    server: Server, prompts: list[list[int]], stock_tokens: list[list[int]]
) -> None:
    """Invariants 2 and 4 with pages: exact prefixes left by compressed requests."""
    off = [{"enabled": False}] * len(prompts)
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, off)
    for stock, response in zip(stock_tokens, responses, strict=True):
        assert response["output_ids"] == stock


def test_shared_document_is_compressed_for_each(
    server: Server, oracle: Oracle, tokens: list[int]
) -> None:
    """scope "prompt": a cached document is compressed too, privately, from its exact entries."""
    document, *questions = cut(tokens, [500, 90, 140], 70_000)
    generate(server.url, document, 1)
    prompts = [document + question for question in questions]
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, [{"budget": 0.2}] * 2)
    for prompt, response in zip(prompts, responses, strict=True):
        found = info(response)
        assert found["suffix_tokens"] == len(prompt)
        assert response["meta_info"]["cached_tokens"] == len(document) // PAGE * PAGE
        prefill = oracle.prefill(prompt, WINDOW)
        keep = KEEP["lava"](prefill, 0, found["kept_tokens"], WINDOW)
        steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        assert_same_tokens(steps, response["output_ids"])


def test_nothing_leaks_at_idle(server: Server) -> None:
    assert_no_leak(server.url)
    server.flush_cache()
    assert_no_leak(server.url)
