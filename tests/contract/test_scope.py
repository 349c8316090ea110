# SPDX-License-Identifier: Apache-2.0
"""scope "auto": a matched prefix stays exact as far as others use it. On SGLang's own tree."""

import os
import random
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.request import LavaReq
from tests.contract.engine import Engine, build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

AUTO = KVCompressionConfig(method="snapkv", budget=0.25, min_tokens=16, window_size=4, scope="auto")
DOCUMENT = list(range(1, 129))


@pytest.fixture(params=[1, 16], ids="page {}".format)
def engine(request: pytest.FixtureRequest) -> Engine:
    return build_engine(request.param, slots=2048, config=AUTO)


def serve(
    engine: Engine,
    tokens: list[int],
    finish: bool = True,
    config: KVCompressionConfig = AUTO,
    **kwargs: Any,
) -> LavaReq:
    req = engine.request(tokens, config, **kwargs)
    assert engine.admit(req)
    engine.extend((req, None))
    engine.check()
    if finish:
        engine.finish(req)
    return req


def exact(engine: Engine, tokens: list[int], answer_len: int = 1, first: int = 1) -> LavaReq:
    """One that is not compressed: its answer goes to the tree, but for the last token."""
    off = {"kv_compression": {"enabled": False}}
    req = serve(engine, tokens, finish=False, custom_params=off)
    req.output_ids[0] = first
    for _ in range(answer_len - 1):
        engine.decode()
    engine.finish(req)
    return req


def shared_and_suffix(req: LavaReq) -> tuple[int, int]:
    assert req.plan is not None, req.skip_reason
    return req.plan.shared_prefix_len, req.plan.suffix_len


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
        assert req.num_matched_prefix_tokens == len(prompt) - 64, "prefilled from the cached turns"


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
    config = AUTO.model_copy(update={"min_tokens": 40})
    short = serve(engine, DOCUMENT + question(2)[:24], config=config)
    assert short.plan is None and short.info()["reason"] == "too_short"
    assert short.num_matched_prefix_tokens == 128, "no window of it has to be prefilled again"


def test_a_question_shorter_than_a_page_is_not_told_from_the_same_prompt() -> None:
    """The tree holds whole pages: of both there are the same 128 tokens in it."""
    for page_size, expected in ((1, (128, 15)), (16, (0, 143))):
        engine = build_engine(page_size, config=AUTO.model_copy(update={"min_tokens": 8}))
        serve(engine, DOCUMENT + question(1)[:15], config=engine.coordinator.config)
        req = serve(engine, DOCUMENT + question(2)[:15], config=engine.coordinator.config)
        assert shared_and_suffix(req) == expected


def test_a_chats_short_question_does_not_make_its_own_turns_exact(engine: Engine) -> None:
    """The match ends before the window, in the middle of the chat's own entries."""
    turns = DOCUMENT + question(1)
    serve(engine, turns)
    window = AUTO.window_size
    for tokens in (turns + question(2)[:2], turns + question(2)[: window - 1]):
        assert shared_and_suffix(serve(engine, tokens)) == (0, len(tokens))


def test_a_chats_short_question_keeps_its_system_prompt_shared(engine: Engine) -> None:
    turns = DOCUMENT + question(1)
    serve(engine, DOCUMENT + question(9))
    serve(engine, turns)
    assert shared_and_suffix(serve(engine, turns + question(2)[:2])) == (128, 66)


@pytest.mark.parametrize("running", [False, True], ids=["one after another", "at once"])
def test_an_identical_prompt_is_not_another_text(engine: Engine, running: bool) -> None:
    prompt = DOCUMENT + question(1)
    for _ in range(3):
        req = serve(engine, prompt, finish=not running)
        assert shared_and_suffix(req) == (0, len(prompt))


def test_identical_prompts_of_one_batch_are_compressed_each(engine: Engine) -> None:
    reqs = [engine.request(DOCUMENT, AUTO) for _ in range(3)]
    assert all(engine.admit(req) for req in reqs)
    engine.extend(*((req, None) for req in reqs))
    engine.check()
    assert [shared_and_suffix(req) for req in reqs] == [(0, 128)] * 3


def test_a_regenerated_turn_is_not_another_text(engine: Engine) -> None:
    """Whatever was said behind it: answers that are in the tree, and a later turn."""
    turn = DOCUMENT + question(1)
    exact(engine, turn, answer_len=40)
    exact(engine, turn, answer_len=40, first=7)
    serve(engine, turn + question(2))
    assert shared_and_suffix(serve(engine, turn)) == (0, len(turn))


def test_the_samples_of_one_prompt_are_compressed_each(engine: Engine) -> None:
    """n > 1: SGLang caches the prompt first, by a request without an answer."""
    first = serve(engine, DOCUMENT, max_new_tokens=0)
    assert first.info()["reason"] == "no_decode"
    for _ in range(3):
        assert shared_and_suffix(serve(engine, DOCUMENT, finish=False)) == (0, 128)


def test_an_answer_in_the_tree_is_the_chats_own(engine: Engine) -> None:
    """A turn too short to compress leaves its answer there; the next goes on from it."""
    turn = exact(engine, DOCUMENT, answer_len=33)
    follow_up = DOCUMENT + list(turn.output_ids) + question(1)
    assert shared_and_suffix(serve(engine, follow_up)) == (0, len(follow_up))


def test_an_edited_turn_is_another_text(engine: Engine) -> None:
    """Nothing tells it from a second question about a document."""
    serve(engine, DOCUMENT + question(1))
    assert shared_and_suffix(serve(engine, DOCUMENT + question(2))) == (128, 64)


def test_others_are_those_of_the_same_namespace(engine: Engine) -> None:
    serve(engine, DOCUMENT + question(1), extra_key="one")
    serve(engine, DOCUMENT + question(1), cache_salt="two")
    req = serve(engine, DOCUMENT + question(2))
    assert shared_and_suffix(req) == (0, len(DOCUMENT + question(2)))
    same = serve(engine, DOCUMENT + question(2), extra_key="one")
    assert shared_and_suffix(same) == (128, 64)


def test_what_was_evicted_is_no_longer_shared(engine: Engine) -> None:
    serve(engine, DOCUMENT + question(1))
    engine.tree.evict(EvictParams(num_tokens=2048))
    engine.served.clear()
    assert shared_and_suffix(serve(engine, DOCUMENT + question(2))) == (0, 192)


def test_its_own_chunks_are_not_another_text(engine: Engine) -> None:
    """Half prefilled, then retracted: the tree holds its first chunks."""
    req = engine.request(DOCUMENT + question(1), AUTO)
    assert engine.admit(req)
    for _ in range(2):
        engine.extend((req, 48))
        req.init_next_round_input()
    engine.retract(req)
    assert engine.admit(req) and req.prefix_len == 96
    engine.extend((req, None))
    engine.check()
    assert shared_and_suffix(req) == (0, 192)


def test_a_retracted_request_shares_what_others_use_by_then(engine: Engine) -> None:
    first = serve(engine, DOCUMENT + question(1), finish=False)
    assert shared_and_suffix(first) == (0, 192)
    engine.retract(first)
    assert engine.admit(first)
    engine.extend((first, None))
    assert shared_and_suffix(first) == (0, 193), "its own prompt is there, and nobody else's"
    serve(engine, DOCUMENT + question(2))
    engine.retract(first)
    assert engine.admit(first)
    engine.extend((first, None))
    engine.check()
    assert shared_and_suffix(first) == (128, 66)


def test_without_a_tree_there_are_no_others() -> None:
    engine = build_engine(1, disable_radix_cache=True, config=AUTO)
    assert shared_and_suffix(serve(engine, DOCUMENT)) == (0, 128)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("core", ["python", "rust"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_rule_on_random_texts(
    page_size: int, core: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a text that differs from it somewhere agrees with it, in whole pages; on each of
    SGLang's radix trees (both are the Python one where its build has no Rust)."""
    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", core)
    engine = build_engine(page_size, slots=4096, config=AUTO)
    rng = random.Random(seed)
    cached: list[list[int]] = []
    outcomes = set()
    for _ in range(40):
        tokens = random_text(rng)
        pages = tokens[: len(tokens) // page_size * page_size]
        expected = 0
        for other in cached:
            agreed = len(os.path.commonprefix([pages, other])) // page_size * page_size
            if agreed < min(len(pages), len(other)):
                expected = max(expected, agreed)
        cached.append(pages)
        req = engine.request(tokens, AUTO)
        assert engine.admit(req)
        engine.extend((req, None))
        engine.finish(req)
        suffix_len = len(tokens) - expected
        if suffix_len < AUTO.min_tokens:
            assert req.skip_reason == "too_short"
        elif not AUTO.rungs(suffix_len, page_size):
            assert req.skip_reason == "budget_covers_suffix"
        else:
            assert shared_and_suffix(req) == (expected, suffix_len)
        outcomes.add((req.skip_reason, expected > 0, req.num_matched_prefix_tokens > expected))
    engine.check()
    assert len(outcomes) >= 4, outcomes


def random_text(rng: random.Random) -> list[int]:
    """Of few words, whole or cut off: texts agree by chance, and part anywhere."""
    words = [rng.choice([100, 200]) for _ in range(rng.randrange(2, 6))]
    lengths = [rng.choice([24, 24, 24, 20, 9]) for _ in words]
    return [word + i for word, length in zip(words, lengths, strict=True) for i in range(length)]
