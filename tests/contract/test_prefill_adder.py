# SPDX-License-Identifier: Apache-2.0
"""Admission keeps room for the copy, and never keeps a request out for good because of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from lava_sglang.managers.request import LavaReq
from tests.contract.engine import NUM_LAYERS, Engine, build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

CONFIG = KVCompressionConfig(
    method="streamingllm", budget=0.25, min_tokens=16, window_size=4, scope="suffix"
)
OFF = CONFIG.model_copy(update={"method": "none"})


def adder_of(engine: Engine, chunk: int | None = None, cls: type = LavaPrefillAdder) -> Any:
    return cls(
        page_size=engine.tree.page_size,
        tree_cache=engine.tree,
        token_to_kv_pool_allocator=engine.allocator,
        running_batch=None,
        new_token_ratio=0.5,
        rem_input_tokens=16_384,
        rem_chunk_tokens=chunk,
        **({"coordinator": engine.coordinator} if cls is LavaPrefillAdder else {}),
    )


def matched(engine: Engine, length: int, first: int = 1, **kwargs: Any) -> LavaReq:
    kwargs.setdefault("config", CONFIG)
    ignore_eos = kwargs.pop("ignore_eos", False)
    req = engine.request(range(first, first + length), **kwargs)
    req.sampling_params.ignore_eos = ignore_eos
    req.init_next_round_input(engine.tree)
    return req


def admits(
    engine: Engine, req: LavaReq, chunk: int | None = None, cls: type = LavaPrefillAdder
) -> bool:
    """Whether one pass over an idle pool takes the request. Mutates it and the tree's lock."""
    adder = adder_of(engine, chunk, cls)
    verdict = adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
    assert isinstance(verdict, AddReqResult)
    return adder.can_run_list == [req]


@pytest.fixture(params=[1, 16], ids="page {}".format)
def engine(request: pytest.FixtureRequest) -> Engine:
    return build_engine(request.param, slots=512)


def test_the_copy_is_reserved(engine: Engine) -> None:
    req = matched(engine, 200)
    expected = CONFIG.rungs(200, engine.tree.page_size)[-1]
    adder = adder_of(engine)
    assert PrefillAdder._request_slot_reserve_for_req(adder, req) == 0
    assert adder._request_slot_reserve_for_req(req) == expected
    assert adder._request_slot_reserve_for_req(req, extend_input_len=200) == expected


@pytest.mark.parametrize("chunk", [1, 64, 199])
def test_a_middle_chunk_reserves_nothing(engine: Engine, chunk: int) -> None:
    req = matched(engine, 200)
    assert adder_of(engine)._request_slot_reserve_for_req(req, extend_input_len=chunk) == 0


def test_the_last_of_many_chunks_reserves_the_whole_copy(engine: Engine) -> None:
    req = matched(engine, 200)
    req.begin_prefill(NUM_LAYERS)
    req.prefix_len = 160  # its own chunks
    reserve = adder_of(engine)._request_slot_reserve_for_req(req, extend_input_len=40)
    assert reserve == CONFIG.rungs(200, engine.tree.page_size)[-1]


@pytest.mark.parametrize(
    "kwargs", [{"config": OFF}, {"max_new_tokens": 1}], ids=["off", "no decode"]
)
def test_a_request_that_is_not_compressed_reserves_nothing(
    engine: Engine, kwargs: dict[str, Any]
) -> None:
    assert adder_of(engine)._request_slot_reserve_for_req(matched(engine, 200, **kwargs)) == 0


def test_sglangs_own_reserve_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(engine.allocator), "request_slot_reserve", lambda self, **kwargs: 7, raising=True
    )
    req = matched(engine, 200)
    expected = 7 + CONFIG.rungs(200, engine.tree.page_size)[-1]
    assert adder_of(engine)._request_slot_reserve_for_req(req) == expected
    assert adder_of(engine)._request_slot_reserve_for_req(req, extend_input_len=10) == 7


def test_the_reserve_without_an_engine() -> None:
    """1,000 prompt tokens, 100 output tokens, one page, 250 for the copy.

    The answer grows where the prompt was, so it is not counted beside it.
    """
    req: Any = SimpleNamespace(
        full_untruncated_fill_ids=range(1000),
        prefix_len=0,
        output_ids=[],
        kv=SimpleNamespace(req_pool_idx=None),
        sampling_params=SimpleNamespace(max_new_tokens=100, ignore_eos=False),
        copy_slots=lambda: 250,
    )
    for size, expected in [(1200, 0), (1250, 0), (1251, 250), (5000, 250)]:
        adder = LavaPrefillAdder.__new__(LavaPrefillAdder)
        adder.page_size = adder.per_req_token_overhead = 1
        adder.token_to_kv_pool_allocator = SimpleNamespace(
            size=size, request_slot_reserve=lambda **kwargs: 0
        )
        adder.tree_cache = SimpleNamespace(disable=False)
        adder.coordinator = SimpleNamespace(
            demand=SimpleNamespace(pool_slots=lambda size=size: size)
        )
        assert adder._request_slot_reserve_for_req(req) == expected, size


def test_two_requests_are_not_admitted_into_room_for_one_and_a_copy(engine: Engine) -> None:
    """Both prompts fit, both copies do not: the second waits."""
    adder = adder_of(engine)
    first, second = matched(engine, 205), matched(engine, 205, first=1000)
    stock = adder_of(engine, cls=PrefillAdder)
    for req in (matched(engine, 205), matched(engine, 205, first=1000)):
        req.sampling_params.max_new_tokens = 8
        stock.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        engine.tree.unlock(req.lock)
    assert len(stock.can_run_list) == 2
    for req in (first, second):
        req.sampling_params.max_new_tokens = 8
        adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
    assert adder.can_run_list == [first]


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("ignore_eos", [False, True], ids=["eos", "ignore eos"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_whatever_sglang_admits_into_an_empty_pool_we_admit(
    page_size: int, ignore_eos: bool, radix: bool
) -> None:
    """Otherwise the request would wait for ever. Around the size where the copy stops to fit."""
    engine = build_engine(page_size, slots=512, disable_radix_cache=not radix)
    kept_out = []
    for length in range(280, 512):
        for max_new_tokens in (2, 33, 100):
            kwargs: Any = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
            verdicts = []
            for cls in (PrefillAdder, LavaPrefillAdder):
                req = matched(engine, length, **kwargs)
                verdicts.append(admits(engine, req, cls=cls))
                engine.tree.unlock(req.lock)
            if verdicts == [True, False]:
                kept_out.append((length, max_new_tokens))
    assert kept_out == []


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_long_fixed_output_without_a_tree_is_admitted(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `ignore_eos` SGLang then plans every output token, not the clipped number of them."""
    engine = build_engine(page_size, slots=8192, disable_radix_cache=True)
    kwargs: Any = {"max_new_tokens": 6000, "ignore_eos": True}
    assert admits(engine, matched(engine, 2000, **kwargs), cls=PrefillAdder)
    assert admits(engine, matched(engine, 2000, **kwargs))


def test_the_last_chunk_of_a_request_alone_is_admitted(engine: Engine) -> None:
    """A chunked request that holds its slots must get through, or nothing ever frees them."""
    page_size = engine.tree.page_size
    stuck = []
    for length in range(300, 470, 5):
        req = matched(engine, length, max_new_tokens=8)
        assert admits(engine, req, chunk=160)
        engine.prefilling.append(req)
        while req.extend_end < length:
            engine.extend((req, req.extend_end - req.prefix_len))
            req.init_next_round_input()
            adder = adder_of(engine, chunk=160)
            adder.add_chunked_req(req)
            if adder.can_run_list != [req]:
                stuck.append((page_size, length, req.prefix_len))
                break
        engine.retract(req)
        engine.tree.reset()
        engine.allocator.clear()
    assert stuck == []


HALF = CONFIG.model_copy(update={"budget": (0.5,)})


def half_prefilled(engine: Engine, config: KVCompressionConfig = HALF) -> LavaReq:
    req = matched(engine, 300, max_new_tokens=8, config=config)
    assert admits(engine, req, chunk=160)
    engine.prefilling.append(req)
    engine.extend((req, req.extend_end - req.prefix_len))
    req.init_next_round_input()
    return req


def test_the_last_chunk_counts_on_all_that_its_request_gives_back(engine: Engine) -> None:
    """Also on its earlier chunks: answers to come are no reason to let it wait."""
    req = half_prefilled(engine)
    adder = adder_of(engine, chunk=160)
    adder.memory_budget.total_offset += int(adder.rem_total_tokens) - 144
    assert adder.add_chunked_req(req) is None
    assert adder.can_run_list == [req]


def test_nobody_overtakes_a_half_prefilled_request_that_waits(engine: Engine) -> None:
    """SGLang asserts that there is one half-prefilled request at most."""
    req = half_prefilled(engine)
    adder = adder_of(engine, chunk=160)
    adder.memory_budget.current_offset += int(adder.cur_rem_tokens) - 150
    assert adder.add_chunked_req(req) is req and adder.can_run_list == []
    adder.memory_budget.current_offset = 0
    other = matched(engine, 200, first=1000, max_new_tokens=8)
    adder.add_one_req(other, has_chunked_req=True, truncation_align_size=None)
    assert adder.can_run_list == [] and adder.new_chunked_req is None


def test_answers_to_come_do_not_shorten_the_chunk_of_a_compressed_prompt(engine: Engine) -> None:
    """Its slots are back before they are wanted: of 8 left, SGLang would prefill 8 tokens."""
    req = half_prefilled(engine)
    adder = adder_of(engine, chunk=32)
    adder.memory_budget.total_offset += int(adder.rem_total_tokens) - 8
    assert adder.add_chunked_req(req) is req
    assert adder.can_run_list == [req] and req.extend_end - req.prefix_len == 32


def test_nobody_overtakes_a_half_prefilled_request_of_a_short_chunk(engine: Engine) -> None:
    """It took what slots there were. More that come by a trim are not another's first chunk.

    Of a request without compression: SGLang takes a part of the chunk where answers want the rest.
    """
    req = half_prefilled(engine, OFF)
    adder = adder_of(engine, chunk=160)
    total = adder.memory_budget.total_offset
    adder.memory_budget.total_offset += int(adder.rem_total_tokens) - 40
    assert adder.add_chunked_req(req) is req and adder.can_run_list == [req]
    adder.memory_budget.total_offset = total
    other = matched(engine, 200, first=1000, max_new_tokens=8)
    adder.add_one_req(other, has_chunked_req=True, truncation_align_size=None)
    assert adder.can_run_list == [req] and adder.new_chunked_req is None
