# SPDX-License-Identifier: Apache-2.0
"""scope "auto": a matched prefix stays exact as far as others use it. On SGLang's own tree."""

from typing import Any

import pytest

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.request import LavaReq
from lava_sglang.mem_cache.row import branch_len
from tests.contract.engine import Engine, build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

AUTO = KVCompressionConfig(method="snapkv", budget=0.25, min_tokens=16, window_size=4, scope="auto")
DOCUMENT = list(range(1, 129))


@pytest.fixture(params=[1, 16], ids="page {}".format)
def engine(request: pytest.FixtureRequest) -> Engine:
    return build_engine(request.param, slots=2048, config=AUTO)


def serve(engine: Engine, tokens: list[int], finish: bool = True, **kwargs: Any) -> LavaReq:
    req = engine.request(tokens, AUTO, **kwargs)
    assert engine.admit(req)
    engine.extend((req, None))
    engine.check()
    if finish:
        engine.finish(req)
    return req


def question(number: int) -> list[int]:
    return list(range(1000 * number, 1000 * number + 64))


def test_a_document_with_many_questions_stays_exact_from_the_second_on(engine: Engine) -> None:
    first = serve(engine, DOCUMENT + question(1))
    assert first.plan is not None and first.plan.shared_prefix_len == 0
    for number in (2, 3):
        req = serve(engine, DOCUMENT + question(number))
        assert req.plan is not None
        assert (req.plan.shared_prefix_len, req.plan.suffix_len) == (128, 64)


def test_the_turns_of_one_chat_are_compressed_whole(engine: Engine) -> None:
    """Each turn's prompt goes on from the last one's, and nothing else does."""
    prompt: list[int] = []
    for number in range(1, 5):
        prompt = prompt + question(number)
        req = serve(engine, prompt)
        assert req.plan is not None and req.plan.shared_prefix_len == 0
        assert req.plan.suffix_len == len(prompt)
        assert req.prefix_len == len(prompt), "prefilled from the cached turns"


def test_a_system_prompt_stays_exact_and_the_chat_behind_it_does_not(engine: Engine) -> None:
    serve(engine, DOCUMENT + question(1))
    serve(engine, DOCUMENT + question(2))
    turn = serve(engine, DOCUMENT + question(1) + question(5))
    assert turn.plan is not None and turn.plan.shared_prefix_len == 128
    assert turn.plan.suffix_len == 128, "the first turn is compressed with the second"


def test_a_running_request_that_goes_on_differently_is_another_user(engine: Engine) -> None:
    serve(engine, DOCUMENT + question(1), finish=False)
    second = serve(engine, DOCUMENT + question(2), finish=False)
    assert second.plan is not None and second.plan.shared_prefix_len == 128


def test_a_short_question_about_a_shared_document_is_served_exact(engine: Engine) -> None:
    serve(engine, DOCUMENT + question(1))
    short = serve(engine, DOCUMENT + question(2)[:8])
    assert short.plan is None and short.info()["reason"] == "too_short"


def test_without_a_tree_there_are_no_branches() -> None:
    engine = build_engine(1, disable_radix_cache=True, config=AUTO)
    assert branch_len(engine.tree, None) == 0
    req = serve(engine, DOCUMENT)
    assert req.plan is not None and req.plan.suffix_len == 128
