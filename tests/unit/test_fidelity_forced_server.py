# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities along a forced reply: the processor, the client, and what is made of them."""

import json
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from benchmarks.fidelity import divergence
from benchmarks.fidelity.contexts import Context
from benchmarks.fidelity.divergence import ContextRecords, compare_on_server
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.server import ForcedReply, check_scope, compare, force, likely_tokens
from lava_sglang.tools.client import OFF, ServerClient
from lava_sglang.tools.forced_tokens import SHIFT, ForcedTokens

VOCABULARY = 200
PROMPT = [1, 2, 3]
TOKENS = [5, 0, 7, 3]


def logits(seed: int, steps: int = len(TOKENS)) -> torch.Tensor:
    return 4 * torch.randn(steps, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def parameters(**more: Any) -> dict[str, Any]:
    request = SimpleNamespace(extend_end=3, origin_input_ids=PROMPT)
    watched = {
        "forced_tokens": [5, 0],
        "watched_tokens": [9, 5, 8, 0],
        "watched_columns": [1, 2, 3],
    }
    return {"__req__": request, **watched, **more}


def test_the_processor_forces_each_token_and_tells_of_others() -> None:
    rows = logits(0, 2)
    params = parameters()
    for step, (forced, watched) in enumerate(((5, [9, 5]), (0, [8, 0]))):
        true = rows[step].log_softmax(0)
        told = ForcedTokens()(rows[step : step + 1].clone(), [params])[0]
        assert int(told.argmax()) == forced
        found = told.log_softmax(0)[[1, 2, 3]] + SHIFT
        expected = torch.stack([*true[watched], true.max()])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    after = logits(1, 1)
    assert torch.equal(ForcedTokens()(after.clone(), [params]), after), "nothing left to force"


def test_a_middle_chunk_forces_nothing() -> None:
    params = parameters()
    params["__req__"].extend_end = 2
    row = logits(0, 1)
    assert torch.equal(ForcedTokens()(row.clone(), [params]), row)
    params["__req__"].extend_end = 3
    assert int(ForcedTokens()(row, [params]).argmax()) == 5


def test_requests_of_a_batch_do_not_mix() -> None:
    first, second = parameters(), parameters(forced_tokens=[11, 12])
    processor = ForcedTokens()
    processor(logits(0, 1), [first])
    told = processor(logits(1, 2), [first, second])
    assert told.argmax(1).tolist() == [0, 11]


class FakeServer:
    """`/generate` of a server whose logits are random, others for a compressed prompt."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.reason = ""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        params = body["sampling_params"]["custom_params"]
        exact = "enabled" in params["kv_compression"]
        rows = logits(0 if exact else 1)
        info = {"status": "skipped", "reason": "disabled"}
        if not exact and not self.reason:
            info = {"status": "compressed", "kept_tokens": 2}
        elif not exact:
            info["reason"] = self.reason
        meta: dict[str, Any] = {"kv_compression": info, "cached_tokens": 0}
        answer: dict[str, Any] = {"text": "", "meta_info": meta}
        if "logprob_start_len" in body:
            top = rows.log_softmax(1).topk(body["top_logprobs_num"])
            pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            listed = [[(v, t, None) for v, t in zip(*pair, strict=True)] for pair in pairs]
            meta["input_top_logprobs"] = [None, *listed[1:]]
            answer["output_ids"] = [0]
        else:
            serialized = json.loads(body["custom_logit_processor"])["callable"]
            processor = pickle.loads(bytes.fromhex(serialized))()
            params["__req__"] = SimpleNamespace(extend_end=3, origin_input_ids=PROMPT)
            told = torch.cat([processor(row[None], [params]) for row in rows])
            answer["output_ids"] = told.argmax(1).tolist()
            columns = body["token_ids_logprob"]
            values = told.log_softmax(1)[:, columns].tolist()
            meta["output_token_ids_logprobs"] = [
                [(v, t, None) for v, t in zip(row, columns, strict=True)] for row in values
            ]
        return httpx.Response(200, json=answer)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(server: FakeServer) -> Iterator[ServerClient]:
    with ServerClient("http://a", transport=httpx.MockTransport(server)) as client:
        yield client


def test_the_client_reads_the_log_probabilities(server: FakeServer, client: ServerClient) -> None:
    likely = likely_tokens(client, PROMPT, TOKENS, 4)
    assert likely == logits(0)[1:].topk(4).indices.tolist()
    watched = [[token, 100, 101] for token in TOKENS[1:]]
    found = force(client, PROMPT, TOKENS, watched, OFF)
    true = logits(0).log_softmax(1)[1:]
    for step, tokens in enumerate(watched):
        assert found.watched[step] == pytest.approx(true[step, tokens].tolist(), abs=2e-5)
        assert found.most_likely[step] == pytest.approx(float(true[step].max()), abs=2e-5)
    body = server.bodies[-1]
    assert body["sampling_params"]["ignore_eos"] and body["input_ids"] == PROMPT
    assert not set(body["token_ids_logprob"]) & set(TOKENS)


def test_another_reply_than_the_forced_one_is_an_error() -> None:
    answer = {"output_ids": TOKENS, "meta_info": {}}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    client = ServerClient("http://a", transport=transport)
    with pytest.raises(RuntimeError, match=r"the server replied \[5, 0, 7, 3\], forced was"):
        force(client, PROMPT, [5, 0, 7, 4], [[0]] * 3, {})


def test_a_comparison_is_that_of_the_whole_vocabulary(client: ServerClient) -> None:
    context = Context("rain", "book", PROMPT, TOKENS)
    results = Results(None, divergence.KEY_FIELDS, {})
    records = ContextRecords(context, 3, results)
    compare_on_server(client, records, [("lava", 2)], VOCABULARY - 10, [])
    full, found = results
    assert full["method"] == "full" and full["continuation"] == TOKENS
    expected = divergence.compare(
        logits(0)[1:].log_softmax(1), logits(1)[1:], torch.tensor(TOKENS[1:])
    )
    assert found["kept_tokens"] == 2
    for field, value in expected.items():
        assert found[field] == pytest.approx(value, abs=1e-4), field


def test_unwatched_tokens_count_as_one() -> None:
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    other = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    replies = [
        ForcedReply(log[:, :2].tolist(), log.max(1).values.tolist(), True, 2, "")
        for log in (exact, other)
    ]
    found = compare(*replies)
    # 1/2 ln 2 + 1/4 ln 1 + 1/4 ln(1/4 / 1/2)
    assert found["kl"] == pytest.approx(0.25 * 0.6931472)
    assert found["nll_change"] == pytest.approx(0.6931472)
    assert found["kl"] < divergence.compare(exact, other, torch.tensor([0]))["kl"]


def test_a_prompt_that_was_not_compressed_is_an_error(
    server: FakeServer, client: ServerClient
) -> None:
    results = Results(None, divergence.KEY_FIELDS, {})
    records = ContextRecords(Context("rain", "book", PROMPT, TOKENS), 3, results)
    server.reason = "too_short"
    with pytest.raises(RuntimeError, match="rain: the server did not compress it: too_short"):
        compare_on_server(client, records, [("lava", 2)], 8, [])


def test_the_scope_has_to_fit() -> None:
    info = {"kv_compression_config": {"scope": "auto"}}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=info))
    client = ServerClient("http://a", transport=transport)
    with pytest.raises(ValueError, match="the server's scope='auto': needs 'prompt'"):
        check_scope(client, "prompt")
