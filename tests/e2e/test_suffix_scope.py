# SPDX-License-Identifier: Apache-2.0
"""Invariants 1, 2, 4 and 5 of a server that compresses suffixes and shares exact prefixes.

One server, page size 1, overlap scheduling on, prompts in chunks of 512. The tests run in order:
each names what the radix tree holds when it starts.
"""

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import (
    assert_no_leak,
    beam_of,
    generate,
    generate_all,
    info,
    metric,
    stats,
)
from tests.e2e.conftest import BEAM_PROMPT, MAX_NEW_TOKENS, WINDOW, StartServer, StockAnswers
from tests.e2e.prompts import cut
from tests.e2e.soak import Report, Traffic, check_idle, checkable, compare, run_traffic
from tests.oracle import Oracle, Prefill, assert_same_tokens
from tests.oracle_keep import KEEP

BUDGETS = [0.5, 0.25, 0.125, 64]
METHODS = list(KEEP)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100"),
        *("--kv-compression-config", '{"scope": "suffix"}'),
        *("--max-total-tokens", "24576", "--chunked-prefill-size", "512"),
    ) as running:
        yield running


def test_compressed_text_is_the_oracles(
    server: Server,
    oracle: Oracle,
    prompts: list[list[int]],
    prefills: list[Prefill],
    stock_tokens: list[list[int]],
) -> None:
    """Invariant 5, cold tree: several methods and budgets in one batch, chunked and not."""
    methods = [METHODS[i % len(METHODS)] for i in range(len(prompts))]
    # A step further each round of methods: budgets and methods meet in more ways than one.
    budgets = [BUDGETS[(i + i // len(METHODS)) % len(BUDGETS)] for i in range(len(prompts))]
    settings: list[Any] = [
        {"budget": budget, "method": method}
        for budget, method in zip(budgets, methods, strict=True)
    ]
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    compressed = 0
    for prompt, prefill, budget, method, response in zip(
        prompts, prefills, budgets, methods, responses, strict=True
    ):
        found = info(response)
        if len(prompt) < 100:
            assert found["reason"] == "too_short"
            continue
        wanted = budget if budget > 1 else math.ceil(budget * len(prompt))
        expected = max(wanted, WINDOW + 1)
        assert found["status"] == "compressed"
        assert found["kept_tokens"] == expected
        assert found["slots_freed"] == len(prompt) - expected
        keep = KEEP[method](prefill, 0, found["kept_tokens"], WINDOW)
        steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        report(prompt, budget, assert_same_tokens(steps, response["output_ids"]))
        compressed += 1
    assert compressed == 20
    changed = [
        response["output_ids"] != stock
        for response, stock in zip(responses, stock_tokens, strict=True)
    ]
    assert any(changed), "compression changed no text of 20: the comparison shows nothing"


def report(prompt: list[int], budget: float, excused: list[tuple[int, float]]) -> None:
    for step, gap in excused:
        print(f"{len(prompt)} tokens, budget {budget}: step {step} differs, logit gap {gap:.2e}")


def test_prefix_hit_after_compression_gives_the_cold_text(
    server: Server, prompts: list[list[int]], stock_tokens: list[list[int]]
) -> None:
    """Invariant 4 and 2: the tree holds the exact prompts that were compressed for others."""
    off = [{"enabled": False}] * len(prompts)
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, off)
    for prompt, stock, response in zip(prompts, stock_tokens, responses, strict=True):
        assert response["meta_info"]["cached_tokens"] >= len(prompt) - 1
        assert info(response)["reason"] == "disabled"
        assert response["output_ids"] == stock


def test_budget_of_the_whole_suffix_is_stock(
    server: Server, prompts: list[list[int]], stock_tokens: list[list[int]]
) -> None:
    """Invariant 1, cold tree, chunked."""
    server.flush_cache()
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, [{"budget": 1.0}] * len(prompts))
    for prompt, stock, response in zip(prompts, stock_tokens, responses, strict=True):
        expected = "too_short" if len(prompt) < 100 else "budget_covers_suffix"
        assert info(response)["reason"] == expected
        assert response["output_ids"] == stock


@pytest.mark.parametrize("method", METHODS)
def test_shared_prefix_stays_exact(
    server: Server, oracle: Oracle, tokens: list[int], method: str
) -> None:
    """Invariant 5 with a cached prefix: one document, several questions, compressed or not."""
    start = 30_000 + 3_000 * METHODS.index(method)
    document, *questions = cut(tokens, [500, 150, 200, 300, 420], start)
    first = generate(server.url, document, 1)
    assert info(first)["reason"] == "no_decode"
    prompts = [document + question for question in questions]
    settings = [{"budget": budget, "method": method} for budget in BUDGETS]
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    for prompt, question, response in zip(prompts, questions, responses, strict=True):
        found = info(response)
        assert found["status"] == "compressed"
        assert found["shared_prefix_tokens"] == len(document)
        assert found["suffix_tokens"] == len(question)
        prefill = oracle.prefill(prompt, WINDOW)
        keep = KEEP[method](prefill, len(document), found["kept_tokens"], WINDOW)
        steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        report(prompt, found["kept_tokens"], assert_same_tokens(steps, response["output_ids"]))
    # The same again: now the whole prompt is in the tree, and nothing of it is the request's own.
    again = generate(server.url, prompts[0], MAX_NEW_TOKENS, settings[0])
    exact = generate(server.url, prompts[0], MAX_NEW_TOKENS, {"enabled": False})
    assert info(again)["reason"] == "too_short"
    assert again["output_ids"] == exact["output_ids"]


def test_neighbours_are_not_changed(server: Server, prompts: list[list[int]]) -> None:
    """The same request alone and among compressed ones; and twice with the same seed."""
    server.flush_cache()
    alone = generate(server.url, prompts[8], MAX_NEW_TOKENS, {"method": "random", "budget": 0.3})
    server.flush_cache()
    settings: list[Any] = [{"method": "random", "budget": 0.3}, {"budget": 0.5}, {"budget": 40}]
    among = generate_all(server.url, prompts[8:11], MAX_NEW_TOKENS, settings)
    assert info(alone)["status"] == info(among[0])["status"] == "compressed"
    assert among[0]["output_ids"] == alone["output_ids"]


def test_a_beam_in_rows_that_compressed_requests_had_is_stock(
    server: Server, prompts: list[list[int]], stock_answers: StockAnswers
) -> None:
    """SGLang takes the rows of a beam's members without a prefill."""
    server.flush_cache()
    responses = generate_all(server.url, prompts[8:12], MAX_NEW_TOKENS, [{"budget": 40}] * 4)
    assert [info(response)["status"] for response in responses] == ["compressed"] * 4
    beam = beam_of(server.url, prompts[BEAM_PROMPT])
    assert len(beam) == 3 and all(len(answer) == 40 for answer in beam)
    assert beam == stock_answers.beam


def test_generated_tokens_are_not_published(server: Server, tokens: list[int]) -> None:
    """The tree never holds an entry that was computed from lossy ones."""
    (prompt,) = cut(tokens, [300], 50_000)
    first = generate(server.url, prompt, 24, {"budget": 40})
    assert info(first)["status"] == "compressed"
    follow_up = prompt + first["output_ids"]
    second = generate(server.url, follow_up, 1)
    assert second["meta_info"]["cached_tokens"] == len(prompt)


BAD_REQUESTS = [
    ({"budget": -1}, "kv_compression.budget=-1: accepts a fraction of the suffix in (0, 1]"),
    (
        {"budget": 20},
        "kv_compression.budget=20: accepts a fraction",
    ),
    ({"budget": "much"}, "kv_compression.budget='much': accepts a fraction"),
    ({"method": "lru"}, "kv_compression.method='lru': accepts one of lava, lava_span, adakv"),
    ({"enabled": 3}, "kv_compression.enabled=3: accepts true or false"),
    ({"bugdet": 0.1}, "kv_compression.bugdet=0.1: unknown field, accepts enabled, method, budget"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_REQUESTS, ids=str)
def test_bad_settings_end_their_request_only(
    server: Server, tokens: list[int], settings: dict[str, Any], message: str
) -> None:
    (prompt,) = cut(tokens, [120], 60_000)
    custom_params = {"kv_compression": settings}
    one = {"max_new_tokens": 4, "custom_params": custom_params}
    openai = {"model": "demo", "custom_params": custom_params}
    bodies = [
        ("/generate", {"input_ids": prompt, "sampling_params": one}),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 4}, one]}),
        ("/v1/completions", {**openai, "prompt": "Hello"}),
        ("/v1/chat/completions", {**openai, "messages": [{"role": "user", "content": "Hello"}]}),
    ]
    for stream in (False, True):
        for route, body in bodies:
            response = httpx.post(server.url + route, json={**body, "stream": stream}, timeout=60)
            assert response.status_code == 400, (route, stream, response.text)
            assert message.replace("'", "") in response.text.replace("'", "").replace('\\"', '"')
    assert len(generate(server.url, prompt, 4)["output_ids"]) == 4


def test_operator_sees_the_totals(server: Server, prompts: list[list[int]]) -> None:
    before = stats(server.url)
    server.flush_cache()
    response = generate(server.url, prompts[9], 8, {"budget": 0.25})
    after = stats(server.url)
    freed = info(response)["slots_freed"]
    assert after["requests"]["compressed"] == before["requests"]["compressed"] + 1
    assert after["slots_freed"] == before["slots_freed"] + freed
    assert after["running_compressed_requests"] == 0
    skipped = after["requests"]["skipped"]
    assert skipped["disabled"] >= 20 and skipped["budget_covers_suffix"] >= 20
    counted = metric(server.url, "sglang:kv_compression_requests_total")
    assert counted == after["requests"]["compressed"] + sum(skipped.values())
    assert metric(server.url, "sglang:kv_compression_seconds_count") > 0
    info_args = server.server_info()
    assert info_args["kv_compression"] == "lava"
    assert info_args["kv_compression_min_tokens"] == 100
    log = server.log_path.read_text()
    assert "#kv-comp-req: " in log and "kv-comp slots saved: " in log


def test_nothing_leaks_at_idle(server: Server) -> None:
    """Invariant 3, after all of the above; and after a flush every slot is free."""
    assert_no_leak(server.url)
    assert stats(server.url)["evictable_slots"] > 0
    server.flush_cache()
    assert_no_leak(server.url)
    assert stats(server.url)["evictable_slots"] == 0


def test_a_short_soak(server: Server, oracle: Oracle, tokens: list[int]) -> None:
    """What `make soak` does for an hour, on one kind of server: everything at once."""
    report = Report("lava, scope suffix")
    traffic = Traffic(server.url, tokens, 5, report)
    run_traffic(traffic, seconds=90, clients=4, most=40)
    check_idle(server.url, report)
    assert report.problems == [] and report.leaked_slots == 0
    for one in list(checkable(traffic.answered, fixed=True))[:8]:
        compare(oracle, one, report)
    assert report.wrong == [] and sum(report.compared.values()) >= 4
