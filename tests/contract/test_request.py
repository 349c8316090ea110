# SPDX-License-Identifier: Apache-2.0
"""A request's plan, from SGLang's own `Req`: when it is compressed, to what, or why not."""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.sampling.sampling_params import SamplingParams

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.managers.compression_state import NO_PRESSURE, CompressionPlan, SkipReason
from lava_sglang.managers.request import LavaReq
from lava_sglang.metrics import CompressionStats

pytestmark = pytest.mark.usefixtures("runtime_context")

LAYERS = 2
CONFIG = KVCompressionConfig(
    method="snapkv", budget=0.25, min_tokens=100, window_size=32, scope="suffix"
)


def request(
    length: int = 1000,
    config: KVCompressionConfig = CONFIG,
    page_size: int = 1,
    max_new_tokens: int = 16,
    custom_params: Any = None,
    n: int = 1,
    **kwargs: Any,
) -> LavaReq:
    """As the scheduler builds one and puts it in its queue."""
    req = LavaReq(
        "rid",
        "",
        array("q", range(length)),
        SamplingParams(max_new_tokens=max_new_tokens, custom_params=custom_params, n=n),
        config=config,
        layers=LayerMap.plain(LAYERS),
        page_size=page_size,
        vocab_size=100_000,
        **kwargs,
    )
    req.refresh_fill_ids()
    return req


def with_config(**changes: Any) -> KVCompressionConfig:
    return KVCompressionConfig(**{**CONFIG.model_dump(), **changes})


@pytest.mark.parametrize(
    ("length", "prefix_len", "page_size", "budget", "expected"),
    [
        (1000, 0, 1, 0.25, 250),
        (1000, 600, 1, 0.25, 100),  # of the suffix, not of the prompt
        (1000, 0, 64, 0.25, 256),
        (1000, 640, 64, 0.25, 128),
        (1000, 0, 1, 64, 64),
        (1000, 0, 16, 33, 48),
        (120, 0, 1, 0.25, 33),  # the window and one more
    ],
)
def test_a_plan(length: int, prefix_len: int, page_size: int, budget: float, expected: int) -> None:
    req = request(length, with_config(budget=budget), page_size)
    plan = req.plan_for(prefix_len)
    assert plan == CompressionPlan(length, prefix_len, (expected,))
    assert isinstance(plan, CompressionPlan)
    assert plan.suffix_len == length - prefix_len


def test_scope_prompt_plans_the_whole_prompt() -> None:
    req = request(config=with_config(scope="prompt"))
    assert req.plan_for(640) == req.plan_for(0) == CompressionPlan(1000, 0, (250,))


@pytest.mark.parametrize(
    ("reason", "kwargs", "prefix_len"),
    [
        (SkipReason.DISABLED, {"custom_params": {"kv_compression": {"enabled": False}}}, 0),
        (SkipReason.TOO_SHORT, {"length": 99}, 0),
        (SkipReason.TOO_SHORT, {"length": 1000}, 901),
        (SkipReason.BUDGET_COVERS_SUFFIX, {"config": with_config(budget=1.0)}, 0),
        (SkipReason.BUDGET_COVERS_SUFFIX, {"config": with_config(budget=1000.0)}, 0),
        (SkipReason.BUDGET_COVERS_SUFFIX, {"config": with_config(min_tokens=1), "length": 33}, 0),
        (
            SkipReason.BUDGET_COVERS_SUFFIX,
            {"config": with_config(budget=0.9), "length": 250, "page_size": 256},
            0,
        ),
        (SkipReason.NO_DECODE, {"max_new_tokens": 1}, 0),
        (SkipReason.NO_DECODE, {"max_new_tokens": 0}, 0),
        (SkipReason.UNSUPPORTED_REQUEST, {"return_routed_experts": True}, 0),
        (SkipReason.UNSUPPORTED_REQUEST, {"return_indexer_topk": True}, 0),
        (SkipReason.UNSUPPORTED_REQUEST, {"input_embeds": [[0.0]] * 1000}, 0),
        (SkipReason.UNSUPPORTED_REQUEST, {"positional_embed_overrides": object()}, 0),
        (SkipReason.SESSION, {"session": SimpleNamespace(streaming=False)}, 0),
    ],
)
def test_why_a_request_is_not_compressed(
    reason: SkipReason, kwargs: dict[str, Any], prefix_len: int
) -> None:
    assert request(**kwargs).plan_for(prefix_len) is reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("beam_group", SkipReason.UNSUPPORTED_REQUEST),
        ("session_generation", SkipReason.SESSION),
    ],
)
def test_what_sglang_attaches_later_is_not_compressed(name: str, reason: SkipReason) -> None:
    req = request()
    setattr(req, name, object())
    assert req.plan_for(0) is reason


def test_a_prompt_with_images_is_compressed_as_its_tokens_are() -> None:
    req = request()
    req.multimodal_inputs = object()
    assert req.plan_for(0) == request().plan_for(0)


def test_a_request_that_is_kept_from_the_tree_is_not_compressed() -> None:
    req = request()
    req.skip_radix_cache_insert = True
    assert req.plan_for(0) is SkipReason.UNSUPPORTED_REQUEST
    req.skip_radix_cache_insert = False
    req.begin_prefill(LAYERS)
    req.take_tape(250)
    req.skip_radix_cache_insert = True  # then the flag is our own
    assert isinstance(req.plan_for(0), CompressionPlan)


def test_every_reason_is_shown() -> None:
    """Those that no plan gives are set by the coordinator."""
    assert {NO_PRESSURE, *(reason.value for reason in SkipReason)} == {
        "disabled",
        "too_short",
        "parallel_samples",
        "budget_covers_suffix",
        "no_decode",
        "no_room",
        "no_pressure",
        "no_queries",
        "aborted",
        "session",
        "unsupported_request",
    }


def test_output_tokens_that_a_retraction_kept_are_part_of_the_prompt() -> None:
    req = request(max_new_tokens=16)
    req.output_ids.extend(range(10))
    req.refresh_fill_ids()
    assert req.plan_for(0) == CompressionPlan(1010, 0, (253,))
    req.output_ids.extend(range(5))
    assert req.plan_for(0) is SkipReason.NO_DECODE


def test_the_plan_is_fixed_at_the_first_chunk() -> None:
    req = request()
    req.prefix_len = 128
    req.begin_prefill(LAYERS)
    assert req.plan == CompressionPlan(1000, 128, (218,))
    req.prefix_len = 512  # its own chunk, in the tree by now
    req.begin_prefill(LAYERS)
    assert req.plan == CompressionPlan(1000, 128, (218,))
    assert req.copy_slots() == 218


def test_a_skip_is_fixed_at_the_first_chunk() -> None:
    req = request(length=90)
    req.begin_prefill(LAYERS)
    req.begin_prefill(LAYERS)
    assert (req.plan, req.skip_reason) == (None, SkipReason.TOO_SHORT)
    assert req.copy_slots() == 0


def test_no_slots_are_kept_for_a_request_that_was_skipped() -> None:
    """Rounded to pages, the smaller rest of a later chunk may seem worth compressing."""
    config = with_config(budget=0.96, min_tokens=1)
    req = request(320, config, page_size=16)
    req.begin_prefill(LAYERS)
    assert req.skip_reason == SkipReason.BUDGET_COVERS_SUFFIX
    req.prefix_len = 15  # one chunk on
    assert isinstance(req.plan_for(15), CompressionPlan)
    assert req.copy_slots() == 0


def test_the_copy_is_known_before_the_first_chunk() -> None:
    req = request()
    assert req.copy_slots() == 250
    req.prefix_len = 600
    assert req.copy_slots() == 100
    assert req.plan is None  # asking fixes nothing


@pytest.mark.parametrize("logprob_start_len", [None, 400])
def test_a_prefix_match_is_sglangs_where_the_prefix_stays(logprob_start_len: int | None) -> None:
    req = request(return_logprob=logprob_start_len is not None)
    if logprob_start_len is not None:
        req.logprob_start_len = logprob_start_len
    expected = 999 if logprob_start_len is None else logprob_start_len
    assert req._compute_max_prefix_len(1000) == expected


@pytest.mark.parametrize(
    ("config", "length", "expected"),
    [
        (with_config(scope="prompt"), 1000, 968),  # the window is prefilled
        (with_config(scope="prompt", window_size=1), 1000, 999),
        (with_config(scope="prompt", window_size=100, min_tokens=1), 150, 50),
        (with_config(scope="prompt"), 99, 98),  # not compressed: SGLang's own
        (with_config(scope="prompt", budget=1.0), 1000, 999),
        (with_config(scope="suffix"), 1000, 999),
    ],
)
def test_a_compressed_prefix_leaves_the_window_to_be_prefilled(
    config: KVCompressionConfig, length: int, expected: int
) -> None:
    assert request(length, config)._compute_max_prefix_len(length) == expected


def test_the_lower_limit_counts() -> None:
    req = request(config=with_config(scope="prompt"), return_logprob=True)
    req.logprob_start_len = 5
    assert req._compute_max_prefix_len(1000) == 5


def retracted(prefix_len: int, **kwargs: Any) -> LavaReq:
    req = request(**kwargs)
    req.prefix_len = prefix_len
    req.begin_prefill(LAYERS)
    req.extend_end = len(req.full_untruncated_fill_ids)
    if req.plan is not None:
        req.take_tape(req.plan.rungs[0])
    req.skip_radix_cache_insert = req.compressed
    req.output_ids.extend([1, 2, 3])
    req.kv.req_pool_idx = None
    req.reset_for_retract()
    req.refresh_fill_ids()
    return req


def test_a_retraction_forgets_the_copy() -> None:
    req = retracted(256)
    assert (req.plan, req.skip_reason, req.compressed, req.window) == (None, None, False, None)
    assert req.skip_radix_cache_insert is False
    assert req.retraction_count == 1 and req.is_retracted


def test_a_retracted_request_owns_what_it_owned() -> None:
    """The tree matches its own exact prompt again; only what was shared before stays shared."""
    req = retracted(256)
    assert req._compute_max_prefix_len(1003) == 1003 - 32
    req.prefix_len = 971
    assert req.copy_slots() == CONFIG.rungs(1003 - 256, 1)[-1]
    req.begin_prefill(LAYERS)
    assert req.plan == CompressionPlan(1003, 256, (187,))


def test_a_retracted_request_whose_prefix_was_evicted_owns_more() -> None:
    req = retracted(256)
    req.prefix_len = 128
    req.begin_prefill(LAYERS)
    assert req.plan == CompressionPlan(1003, 128, (219,))


def test_a_second_retraction_keeps_what_the_first_plan_owned() -> None:
    req = retracted(256)
    req.prefix_len = 971
    req.begin_prefill(LAYERS)
    req.reset_for_retract()
    req.refresh_fill_ids()
    req.prefix_len = 971
    req.begin_prefill(LAYERS)
    assert req.plan is not None and req.plan.shared_prefix_len == 256


def test_a_skipped_request_that_is_retracted_is_stock() -> None:
    req = retracted(256, custom_params={"kv_compression": {"enabled": False}})
    assert req._own_from is None
    assert req._compute_max_prefix_len(1003) == 1002


def test_a_retraction_keeps_another_features_flag() -> None:
    req = request()
    req.skip_radix_cache_insert = True  # beam search, embed overrides
    req.begin_prefill(LAYERS)
    req.reset_for_retract()
    assert req.skip_radix_cache_insert is True


def test_info_of_a_compressed_request() -> None:
    req = request()
    req.prefix_len = 200
    req.begin_prefill(LAYERS)
    req.take_tape(200)
    assert req.info() == {
        "method": "snapkv",
        "status": "compressed",
        "prompt_tokens": 1000,
        "shared_prefix_tokens": 200,
        "suffix_tokens": 800,
        "kept_tokens": 200,
        "slots_freed": 600,
    }


def test_info_of_a_skipped_request() -> None:
    req = request(length=90)
    req.begin_prefill(LAYERS)
    assert req.info() == {
        "method": "snapkv",
        "status": "skipped",
        "prompt_tokens": 90,
        "shared_prefix_tokens": 0,
        "suffix_tokens": 90,
        "reason": "too_short",
        "slots_freed": 0,
    }


def test_info_says_why_a_long_prompt_is_too_short() -> None:
    """Its suffix is what counts: most of it came from the tree."""
    req = request(length=821)
    req.prefix_len = 799
    req.begin_prefill(LAYERS)
    info = req.info()
    assert (info["reason"], info["shared_prefix_tokens"], info["suffix_tokens"]) == (
        "too_short",
        799,
        22,
    )


@pytest.mark.parametrize(
    ("length", "matched", "n", "reason"),
    [
        (1000, 999, 2, SkipReason.PARALLEL_SAMPLES),
        (1000, 999, 1, SkipReason.TOO_SHORT),
        (99, 98, 2, SkipReason.TOO_SHORT),  # its prompt is
    ],
)
def test_parallel_samples_have_a_reason_of_their_own(
    length: int, matched: int, n: int, reason: SkipReason
) -> None:
    """SGLang puts their prompt into the tree before it sends them: each has a suffix of a token."""
    assert request(length, n=n).plan_for(matched) is reason


def test_sglangs_health_check_is_not_counted() -> None:
    stats = CompressionStats()
    for rid in ("HEALTH_CHECK_1", "rid"):
        req = request(max_new_tokens=1)
        req.rid = rid
        req.begin_prefill(LAYERS)
        stats.count(req)
    assert dict(stats.requests) == {"no_decode": 1}


def test_info_of_a_request_that_was_planned_and_found_no_room() -> None:
    req = request()
    req.begin_prefill(LAYERS)
    req.skip_compression(SkipReason.NO_ROOM)
    info = req.info()
    assert (info["status"], info["reason"], info["slots_freed"]) == ("skipped", "no_room", 0)


def test_info_of_a_request_that_never_ran() -> None:
    assert request().info()["reason"] == "not_prefilled"


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        (None, {}),
        ({}, {}),
        ({"budget": 0.1}, {"budget": 0.1}),
        ({"method": "random", "budget": 100}, {"method": "random", "budget": 100}),
        ({"enabled": False}, {"method": "none"}),
    ],
)
def test_a_request_overrides_the_servers_settings(
    override: dict[str, Any] | None, changes: dict[str, Any]
) -> None:
    params: dict[str, Any] = {"other": 1} if override is None else {"kv_compression": override}
    req = request(custom_params=params)
    assert req.compression == with_config(**changes)
    assert req.to_finish is None


def test_without_custom_params_the_servers_settings_hold() -> None:
    assert request().compression is CONFIG


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"budget": -1}, "kv_compression.budget=-1: accepts a fraction of the suffix in (0, 1]"),
        ({"budget": "0.5"}, "kv_compression.budget='0.5': accepts"),
        ({"method": "lava"}, "kv_compression.method='lava': accepts one of snapkv"),
        ({"enabled": 1}, "kv_compression.enabled=1: accepts true or false"),
        ({"window_size": 1}, "kv_compression.window_size=1: unknown field"),
        (True, "kv_compression=True: accepts an object"),
        (0.5, "kv_compression=0.5: accepts an object"),
        ([0.5], "kv_compression=[0.5]: accepts an object"),
        ({1: 2}, "kv_compression.1=2: unknown field"),
    ],
)
def test_a_bad_override_ends_that_request_with_the_reason(override: Any, words: str) -> None:
    req = request(custom_params={"kv_compression": override})
    assert isinstance(req.to_finish, FINISH_ABORT)
    assert words in req.to_finish.message
    assert req.to_finish.status_code == 400
    assert list(req.origin_input_ids) == [0]  # SGLang's own way to end it without a prefill
    assert req.compression == CONFIG  # never half an override


def test_a_request_that_ended_by_its_settings_is_counted_as_aborted() -> None:
    """Not as too short: SGLang runs it with one token in place of its prompt."""
    req = request(custom_params={"kv_compression": {"budget": -1}})
    req.refresh_fill_ids()
    req.begin_prefill(LAYERS)
    assert req.skip_reason == SkipReason.ABORTED


def test_settings_of_another_feature_in_custom_params_are_left_alone() -> None:
    params = {"thinking_budget": 5, "kv_compression": {"budget": 0.5}}
    req = request(custom_params=params)
    assert req.sampling_params.custom_params == params


@pytest.mark.parametrize("custom_params", ["x", [1], 5, 0, True, "", [], {"kv_compression": None}])
def test_custom_params_that_hold_no_settings(custom_params: Any) -> None:
    """Any JSON value: stock SGLang serves a request that sends a string there, and so do we."""
    req = request(custom_params=custom_params)
    assert req.compression is CONFIG and req.to_finish is None


def test_a_fault_of_ours_ends_that_request_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Any, override: Any) -> Any:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(KVCompressionConfig, "for_request", broken)
    req = request(custom_params={"kv_compression": {}})
    assert isinstance(req.to_finish, FINISH_ABORT)
    assert req.to_finish.status_code == 500 and "ZeroDivisionError" in req.to_finish.message
    assert "a fault of ours" in caplog.text and "Traceback" in caplog.text
    assert request().to_finish is None


def test_the_first_reason_stays() -> None:
    """The prompt of a refused request is gone, so SGLang's check of logprob_start_len fails too."""
    req = request(custom_params={"kv_compression": {"budget": -1}})
    req.set_finish_with_abort("logprob_start_len is higher than the number of input tokens")
    assert isinstance(req.to_finish, FINISH_ABORT)
    assert req.to_finish.message.startswith("kv_compression.budget=-1: accepts ")
