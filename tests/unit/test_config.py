# SPDX-License-Identifier: Apache-2.0
"""The settings: what each accepts, how a bad value is answered, how many tokens are kept."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.methods import (
    COMPETING_METHODS,
    METHOD_CHOICES,
    UNIFORM_METHODS,
)
from tests.unit.setting_ranges import BUDGET_RANGE, HEAD_FLOOR_RANGE, METHOD_RANGE

BAD_VALUES: list[tuple[str, Any, str]] = [
    ("method", "lru", METHOD_RANGE),
    ("method", "", METHOD_RANGE),
    ("method", None, METHOD_RANGE),
    ("method", 3, METHOD_RANGE),
    ("budget", 0, BUDGET_RANGE),
    ("budget", -0.5, BUDGET_RANGE),
    ("budget", -100, BUDGET_RANGE),
    ("budget", 64.5, BUDGET_RANGE),
    ("budget", math.inf, BUDGET_RANGE),
    ("budget", math.nan, BUDGET_RANGE),
    ("budget", "0.5", BUDGET_RANGE),
    ("budget", None, BUDGET_RANGE),
    ("budget", True, BUDGET_RANGE),
    ("min_tokens", 0, "a whole number of tokens from 1 up"),
    ("min_tokens", -1, "a whole number of tokens from 1 up"),
    ("min_tokens", 2.5, "a whole number of tokens from 1 up"),
    ("min_tokens", "64", "a whole number of tokens from 1 up"),
    ("window_size", 0, "a whole number of tokens from 1 to 1024"),
    ("window_size", 1025, "a whole number of tokens from 1 to 1024"),
    ("window_size", 32.5, "a whole number of tokens from 1 to 1024"),
    ("window_size", None, "a whole number of tokens from 1 to 1024"),
    ("pool_width", 0, "an odd number of tokens from 1 to 63"),
    ("pool_width", 6, "an odd number of tokens from 1 to 63"),
    ("pool_width", 65, "an odd number of tokens from 1 to 63"),
    ("pool_width", "7", "an odd number of tokens from 1 to 63"),
    ("sink_tokens", -1, "a whole number of tokens from 0 up"),
    ("sink_tokens", 0.5, "a whole number of tokens from 0 up"),
    ("scope", "all", "'suffix', 'prompt' or 'auto'"),
    ("scope", None, "'suffix', 'prompt' or 'auto'"),
    ("scope", 1, "'suffix', 'prompt' or 'auto'"),
    ("trigger", "never", "'always' or 'pressure'"),
    ("decode_interval", 0, "a whole number of tokens above window_size, or null"),
    ("decode_interval", 32, "a whole number of tokens above window_size, or null"),
    ("decode_interval", 64.5, "a whole number of tokens above window_size, or null"),
    ("admit_ahead", 1, "true or false"),
    ("seed", -1, "a whole number from 0 to 2**63 - 1"),
    ("seed", 1.5, "a whole number from 0 to 2**63 - 1"),
    ("uniform_layers", None, "true or false"),
    ("uniform_layers", 1, "true or false"),
    ("uniform_heads", "true", "true or false"),
    ("head_floor", -0.1, HEAD_FLOOR_RANGE),
    ("head_floor", 1.01, HEAD_FLOOR_RANGE),
    ("head_floor", math.nan, HEAD_FLOOR_RANGE),
    ("head_floor", "0.2", HEAD_FLOOR_RANGE),
    ("head_floor", True, HEAD_FLOOR_RANGE),
    ("decode_kernel", "cuda", "'triton' or 'flashinfer'"),
    ("decode_kernel", None, "'triton' or 'flashinfer'"),
]


def reasons(values: dict[str, Any], **kwargs: Any) -> list[str]:
    with pytest.raises(KVCompressionError) as caught:
        KVCompressionConfig.parse(values, **kwargs)
    return caught.value.reasons


def option(setting: str) -> str:
    return f"--kv {setting}"


def test_the_defaults_are_valid_and_off() -> None:
    config = KVCompressionConfig.parse({})
    assert config == KVCompressionConfig()
    assert (config.method, config.budget, config.enabled) == ("none", (0.25,), False)
    assert (config.window_size, config.pool_width, config.scope) == (32, 7, "auto")


@pytest.mark.parametrize(("field", "value", "accepted"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_field_and_range(
    field: str, value: Any, accepted: str
) -> None:
    (reason,) = reasons({field: value})
    assert reason.startswith(f"{field}={value!r}: accepts {accepted}"), reason


def test_every_field_has_a_bad_value_above() -> None:
    assert {field for field, _, _ in BAD_VALUES} == set(KVCompressionConfig.model_fields)


def test_an_unknown_field_is_answered_with_the_known_ones() -> None:
    (reason,) = reasons({"window": 16})
    assert reason.startswith("window=16: unknown field, accepts method, min_tokens, window_size")


def test_all_bad_values_are_reported_together() -> None:
    bad = {
        "method": "lru",
        "budget": -1.0,
        "min_tokens": 0,
        "window_size": 0,
        "pool_width": 2,
        "sink_tokens": -1,
        "scope": "all",
        "seed": -1,
        "decode_kernel": "cuda",
        "window": 1,
    }
    found = reasons(bad)
    assert sorted(reason.partition("=")[0] for reason in found) == sorted(bad)


def test_names_are_shown_as_the_user_typed_them() -> None:
    found = reasons({"budget": -1.0, "scope": "all"}, display=option)
    assert [reason.partition("=")[0] for reason in found] == ["--kv budget", "--kv scope"]


@pytest.mark.parametrize(("budget", "window_size"), [(16, 32), (32, 32), (2, 2), (64, 100)])
def test_a_budget_in_tokens_exceeds_the_window(budget: int, window_size: int) -> None:
    (reason,) = reasons({"budget": budget, "window_size": window_size})
    assert reason.startswith(f"budget={budget}: ")
    assert f"must exceed window_size={window_size}" in reason


def test_the_budget_in_tokens_is_reported_with_the_other_bad_values() -> None:
    found = reasons({"budget": 16, "pool_width": 2})
    assert [reason.partition("=")[0] for reason in found] == ["budget", "pool_width"]


@pytest.mark.parametrize("seed", [2**64, 2**70])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    (reason,) = reasons({"seed": seed})
    assert reason.startswith(f"seed={seed}: accepts ")


@pytest.mark.parametrize("method", sorted({*METHOD_CHOICES} - {"none", *COMPETING_METHODS}))
def test_a_head_floor_is_refused_where_heads_do_not_compete(method: str) -> None:
    (reason,) = reasons({"method": method, "head_floor": 0.3}, display=option)
    why = f"{method} gives every head of a layer the same"
    assert reason == f"--kv head_floor=0.3: accepts {HEAD_FLOOR_RANGE} ({why})"


@pytest.mark.parametrize("method", COMPETING_METHODS)
def test_a_head_floor_contradicts_uniform_heads(method: str) -> None:
    (reason,) = reasons({"method": method, "head_floor": 0, "uniform_heads": True})
    assert reason.startswith(f"head_floor=0: accepts {HEAD_FLOOR_RANGE} (uniform_heads=True gives")


@pytest.mark.parametrize("method", ["none", *COMPETING_METHODS])
@pytest.mark.parametrize("head_floor", [None, 0, 0.2, 1])
def test_good_head_floors(method: str, head_floor: float | None) -> None:
    config = KVCompressionConfig.parse({"method": method, "head_floor": head_floor})
    assert config.head_floor == head_floor


@pytest.mark.parametrize("method", METHOD_CHOICES)
def test_every_method_takes_the_uniform_settings(method: str) -> None:
    values = {"method": method, "uniform_layers": True, "uniform_heads": True}
    assert KVCompressionConfig.parse(values) == KVCompressionConfig(**values)


@pytest.mark.parametrize("method", UNIFORM_METHODS)
def test_the_servers_head_floor_does_not_bind_a_request_of_another_method(method: str) -> None:
    server = KVCompressionConfig(method="lava", head_floor=0.3, uniform_layers=True)
    found = server.for_request({"method": method})
    assert found == server.model_copy(update={"method": method, "head_floor": None})
    assert server.for_request({"budget": 0.5}).head_floor == 0.3
    assert server.for_request({"method": "adakv"}).head_floor == 0.3


@pytest.mark.parametrize("budget", [0.001, 0.25, 1, 1.0, 33, 33.0, 100_000])
def test_good_budgets(budget: float) -> None:
    assert KVCompressionConfig.parse({"budget": budget}).budget == (budget,)


@pytest.mark.parametrize("method", METHOD_CHOICES)
def test_every_method_is_served_or_off(method: str) -> None:
    config = KVCompressionConfig.parse({"method": method})
    assert config.enabled is (method != "none")
    assert config.ragged is (method in ("lava", "lava_span", "adakv", "pyramidkv"))


def test_the_settings_are_frozen_and_hashable() -> None:
    config = KVCompressionConfig(method="snapkv")
    with pytest.raises(ValidationError, match="frozen"):
        config.budget = 0.5
    assert hash(config) == hash(KVCompressionConfig(method="snapkv"))


def test_an_error_joins_its_reasons() -> None:
    assert str(KVCompressionError(["a", "b"])) == "a; b"
    assert str(KVCompressionError(["a", "b"], heading="Cannot")) == "Cannot:\n- a\n- b"
    assert issubclass(KVCompressionError, ValueError)


@pytest.mark.parametrize(
    ("budget", "suffix_len", "page_size", "expected"),
    [
        (0.25, 1000, 1, 250),
        (0.25, 1001, 1, 251),  # a fraction rounds up
        (0.25, 1000, 16, 256),  # and to whole pages
        (64, 1000, 1, 64),
        (64, 1000, 64, 64),
        (65, 1000, 64, 128),
        (0.25, 40, 1, 33),  # the window and one scored token
    ],
)
def test_one_rung(budget: float, suffix_len: int, page_size: int, expected: int) -> None:
    assert KVCompressionConfig(budget=budget).rungs(suffix_len, page_size) == (expected,)


@pytest.mark.parametrize(
    ("budget", "suffix_len", "page_size"),
    [
        (1, 1000, 1),
        (1.0, 1000, 16),
        (2000, 1000, 1),
        (0.999, 1000, 16),
        (0.5, 33, 1),
        (0.25, 40, 16),
    ],
)
def test_no_rung_where_nothing_would_be_dropped(
    budget: float, suffix_len: int, page_size: int
) -> None:
    assert KVCompressionConfig(budget=budget).rungs(suffix_len, page_size) == ()


@pytest.mark.parametrize(
    ("budget", "suffix_len", "page_size", "expected"),
    [
        ((0.5, 0.25, 0.125), 1000, 1, (500, 250, 125)),
        ((0.5, 0.25, 0.125), 100, 1, (50, 33)),  # the lowest two are the window and one entry
        ((0.5, 0.25, 0.2), 64, 16, (48,)),
        ((1, 0.5), 1000, 1, (500,)),
        ((2000, 400, 100), 300, 1, (100,)),
    ],
)
def test_a_ladder_has_different_rungs_only(
    budget: tuple[float, ...], suffix_len: int, page_size: int, expected: tuple[int, ...]
) -> None:
    assert KVCompressionConfig(budget=budget).rungs(suffix_len, page_size) == expected


@pytest.mark.parametrize(
    ("budget", "suffix_len", "covers"),
    [((1, 0.5), 9, True), ((0.9, 0.5), 9, False), ((100, 50), 100, True), ((100, 50), 101, False)],
)
def test_a_first_rung_that_drops_nothing(
    budget: tuple[float, ...], suffix_len: int, covers: bool
) -> None:
    assert KVCompressionConfig(budget=budget).covers(suffix_len) is covers


@pytest.mark.parametrize(
    "budget", [(0.25, 0.5), (0.5, 0.5), (0.5, 64), (64, 0.5), (100, 200), (0.5, 0), (0.5, 1.5)]
)
def test_a_ladder_falls_on_one_scale(budget: tuple[float, ...]) -> None:
    (reason,) = reasons({"budget": budget})
    shown = ",".join(str(int(rung) if rung == int(rung) else rung) for rung in budget)
    assert reason.startswith(f"budget={shown}: accepts {BUDGET_RANGE}")


def test_streamingllm_takes_one_budget() -> None:
    (reason,) = reasons({"method": "streamingllm", "budget": (0.5, 0.25)})
    assert "budget=0.5,0.25" in reason and "streamingllm takes one budget" in reason


@settings(deadline=None, max_examples=300)
@given(
    data=st.data(),
    suffix_len=st.integers(1, 5000),
    page_size=st.sampled_from([1, 2, 16, 64, 256]),
    window_size=st.integers(1, 128),
)
def test_rungs_are_whole_pages_above_the_window_and_grow_with_the_budget(
    data: st.DataObject, suffix_len: int, page_size: int, window_size: int
) -> None:
    budgets = st.one_of(st.floats(1e-6, 1), st.integers(window_size + 1, 6000).map(float))
    smaller, larger = sorted([data.draw(budgets), data.draw(budgets)])
    kept = [
        KVCompressionConfig(budget=budget, window_size=window_size).rungs(suffix_len, page_size)
        or (suffix_len,)
        for budget in (smaller, larger)
    ]
    for (count,) in kept:
        assert type(count) is int and (count == suffix_len or count % page_size == 0)
        assert count == suffix_len or window_size + 1 <= count < suffix_len
    if (smaller <= 1) == (larger <= 1):  # fractions and tokens are two scales
        assert kept[0] <= kept[1]
