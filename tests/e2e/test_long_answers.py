# SPDX-License-Identifier: Apache-2.0
"""Invariant 5 of long answers: what is attended to is chosen again every `INTERVAL` tokens."""

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pytest
import torch

from lava_sglang.tools.server_process import Server
from tests.e2e.client import (
    Response,
    assert_no_leak,
    generate,
    generate_all,
    info,
    metric,
    stream_events,
)
from tests.e2e.conftest import StartServer
from tests.e2e.prompts import cut
from tests.oracle import Oracle, assert_same_tokens
from tests.oracle_keep import KEEP
from tests.oracle_tails import LongAnswer, Rule, long_answer

WINDOW, INTERVAL = 16, 48
ANSWER = 130  # tokens
# A tail of INTERVAL + 1 tokens is chosen from before the next decode step; the last token has none.
CHOSEN_FROM = (ANSWER - 2) // (INTERVAL + 1) * (INTERVAL + 1)
# Measured on SmolLM2-135M, 16 answers of 130 tokens: 2e-5. By a wrong rule (a pool of 5 tokens, a
# window or an interval one token off, the other method's scores): 2e-2 or more.
LOGPROB_ERROR = 2e-3


class Case(NamedTuple):
    method: Literal["lava", "snapkv"]
    budget: float
    prompt: list[int]
    prefix_len: int = 0  # tokens of the prompt that the tree holds


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[Server]:
    settings = f'{{"decode_interval": {INTERVAL}, "window_size": {WINDOW}, "scope": "suffix"}}'
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100"),
        *("--kv-compression-config", settings),
        *("--max-total-tokens", "8192", "--chunked-prefill-size", "512"),
        *("--max-running-requests", "8"),  # decode queries are held for so many
    ) as running:
        yield running


@pytest.fixture(scope="module")
def cases(tokens: list[int]) -> list[Case]:
    document, question, short, middle, long = cut(tokens, [150, 250, 160, 300, 600], 5_000)
    return [
        Case("lava", 0.25, document + question, len(document)),
        Case("snapkv", 0.5, short),
        Case("lava", 64, middle),
        Case("snapkv", 0.25, long),
    ]


@pytest.fixture(scope="module")
def responses(server: Server, cases: list[Case]) -> list[Response]:
    """All in one batch, with the first one's document in the tree."""
    generate(server.url, cases[0].prompt[: cases[0].prefix_len], 1)
    settings: list[Any] = [{"method": case.method, "budget": case.budget} for case in cases]
    prompts = [case.prompt for case in cases]
    return generate_all(server.url, prompts, ANSWER, settings, return_logprob=True)


def test_long_answers_are_the_oracles(
    cases: list[Case], responses: list[Response], oracle: Oracle
) -> None:
    """Greedy answers repeat themselves and hide wrong choices: each token's logprob does not."""
    texts_changed = 0
    for case, response in zip(cases, responses, strict=True):
        found, answer = info(response), response["output_ids"]
        assert len(answer) == ANSWER
        assert found["shared_prefix_tokens"] == case.prefix_len
        assert found["answer_tokens_compressed"] == CHOSEN_FROM == 98
        suffix_len = len(case.prompt) - case.prefix_len
        assert found["slots_freed"] == suffix_len + CHOSEN_FROM - found["kept_tokens"]

        prefill = oracle.prefill(case.prompt, WINDOW)
        keep = KEEP[case.method](prefill, case.prefix_len, found["kept_tokens"], WINDOW)
        rule = Rule(case.method, case.prefix_len, WINDOW, INTERVAL)
        chosen = long_answer(oracle, prefill, keep, rule, answer)
        assert len(chosen.keeps) == 3
        for step, gap in assert_same_tokens(chosen.steps, answer):
            print(f"{case.method} {case.budget}: step {step} differs, logit gap {gap:.2e}")
        error = worst_logprob(chosen, response)
        assert error < LOGPROB_ERROR, (case.method, case.budget, error)

        unchosen = long_answer(oracle, prefill, keep, None, answer)
        assert worst_logprob(unchosen, response) > 10 * LOGPROB_ERROR
        texts_changed += any(step.gap > LOGPROB_ERROR for step in unchosen.steps)
    assert texts_changed > 0


def worst_logprob(oracle_answer: LongAnswer, response: Response) -> float:
    said = [logprob for logprob, *_ in response["meta_info"]["output_token_logprobs"]]
    return float((oracle_answer.logprobs - torch.tensor(said)).abs().max())


def test_a_streamed_answer_is_the_same(
    server: Server, cases: list[Case], responses: list[Response]
) -> None:
    server.flush_cache()
    case = cases[2]
    settings = {"method": case.method, "budget": case.budget}
    last = list(stream_events(server.url, case.prompt, settings, ANSWER))[-1]
    assert last["text"] == responses[2]["text"]
    assert last["meta_info"]["completion_tokens"] == ANSWER
    assert info(last) == info(responses[2])


def test_a_grammar_holds_across_choices(server: Server, cases: list[Case]) -> None:
    server.flush_cache()
    constraint = {"regex": "[a-z]{1,9}( [a-z]{1,9}){400}"}
    response = generate(server.url, cases[3].prompt, ANSWER, sampling=constraint)
    assert len(response["output_ids"]) == ANSWER
    assert info(response)["answer_tokens_compressed"] == CHOSEN_FROM
    assert re.fullmatch("[a-z]{1,9}( [a-z]{1,9})* ?", response["text"])


def test_nothing_leaks_at_idle(server: Server) -> None:
    assert metric(server.url, "sglang:kv_compression_seconds_count") >= 3 * 4
    assert_no_leak(server.url)
    server.flush_cache()
    assert_no_leak(server.url)
