# SPDX-License-Identifier: Apache-2.0
"""What a request may set of its own: laid over the server's settings, or answered by name."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.config import MAX_STEPS, KVCompressionConfig, KVCompressionError
from lava_sglang.methods import METHOD_CHOICES, METHODS, RAGGED_METHODS, UNIFORM_METHODS
from tests.unit.setting_ranges import BUDGET_RANGE, METHOD_RANGE


@pytest.fixture
def server() -> KVCompressionConfig:
    return KVCompressionConfig(method="snapkv", budget=0.25, min_tokens=64, scope="prompt", seed=3)


def request_reasons(server: KVCompressionConfig, override: Any) -> list[str]:
    with pytest.raises(KVCompressionError) as caught:
        server.for_request(override)
    return caught.value.reasons


@pytest.mark.parametrize("override", [{}, {"enabled": True}])
def test_a_request_keeps_what_it_does_not_name(
    server: KVCompressionConfig, override: dict[str, Any]
) -> None:
    assert server.for_request(override) == server


@pytest.mark.parametrize("override", [{"enabled": False}, {"enabled": False, "budget": 0.5}])
def test_a_request_switches_compression_off(
    server: KVCompressionConfig, override: dict[str, Any]
) -> None:
    assert server.for_request(override).enabled is False
    assert server.enabled


@pytest.mark.parametrize(
    "override",
    [{"budget": 0.5}, {"budget": 1}, {"budget": 100}, {"method": "random"}]
    + [{"method": method, "budget": 0.1} for method in UNIFORM_METHODS],
)
def test_a_request_overrides_method_and_budget(
    server: KVCompressionConfig, override: dict[str, Any]
) -> None:
    if "budget" in override:
        override = {**override, "budget": (override["budget"],)}
    assert server.for_request(override) == server.model_copy(update=override)


@pytest.mark.parametrize(
    ("override", "field", "accepted"),
    [
        ({"enabled": 1}, "enabled", "true or false"),
        ({"enabled": "false"}, "enabled", "true or false"),
        ({"enabled": None}, "enabled", "true or false"),
        ({"budget": 0}, "budget", BUDGET_RANGE),
        ({"budget": -1}, "budget", BUDGET_RANGE),
        ({"budget": 40.5}, "budget", BUDGET_RANGE),
        ({"budget": "0.5"}, "budget", BUDGET_RANGE),
        ({"budget": None}, "budget", BUDGET_RANGE),
        ({"budget": []}, "budget", BUDGET_RANGE),
        ({"budget": True}, "budget", BUDGET_RANGE),
        ({"method": "none"}, "method", METHOD_RANGE),
        ({"method": "lru"}, "method", METHOD_RANGE),
        ({"method": 3}, "method", METHOD_RANGE),
        ({"method": None}, "method", METHOD_RANGE),
    ],
)
def test_a_bad_override_is_named(
    server: KVCompressionConfig, override: dict[str, Any], field: str, accepted: str
) -> None:
    (reason,) = request_reasons(server, override)
    value = override[field]
    assert reason.startswith(f"kv_compression.{field}={value!r}: accepts {accepted}"), reason


@pytest.mark.parametrize("method", RAGGED_METHODS)
@pytest.mark.parametrize("served", UNIFORM_METHODS)
def test_a_ragged_method_is_refused_where_the_server_runs_a_uniform_one(
    served: str, method: str
) -> None:
    (reason,) = request_reasons(KVCompressionConfig(method=served), {"method": method})
    assert reason == (
        f"kv_compression.method={method!r}: accepts one of snapkv, streamingllm, random on this "
        f"server, which runs {served} on a decode backend for equal budgets"
    )


@pytest.mark.parametrize("method", METHOD_CHOICES[1:])
@pytest.mark.parametrize("served", RAGGED_METHODS)
def test_a_ragged_server_takes_every_method(served: str, method: str) -> None:
    server = KVCompressionConfig(method=served)
    assert server.for_request({"method": method}).method == method


def test_an_override_in_tokens_exceeds_the_servers_window(server: KVCompressionConfig) -> None:
    (reason,) = request_reasons(server, {"budget": 32})
    assert reason.startswith("kv_compression.budget=32: ") and "window_size=32" in reason


@pytest.mark.parametrize("override", [0.5, "off", [1], False, 0, ""])
def test_an_override_is_an_object(server: KVCompressionConfig, override: Any) -> None:
    (reason,) = request_reasons(server, override)
    assert reason.startswith(f"kv_compression={override!r}: accepts an object with any of ")
    assert reason.endswith("enabled, method, budget")


@pytest.mark.parametrize("field", ["window_size", "scope", "min_tokens", "seed", "bugdet"])
def test_other_fields_are_the_servers(server: KVCompressionConfig, field: str) -> None:
    (reason,) = request_reasons(server, {field: 1})
    expected = f"kv_compression.{field}=1: unknown field, accepts enabled, method, budget"
    assert reason == expected


def test_all_bad_overrides_are_reported_together(server: KVCompressionConfig) -> None:
    found = request_reasons(server, {"enabled": 1, "method": "lru", "budget": "x", "scope": 1})
    assert len(found) == 4


def test_a_bad_budget_is_refused_also_where_compression_is_switched_off(
    server: KVCompressionConfig,
) -> None:
    (reason,) = request_reasons(server, {"enabled": False, "budget": -5})
    assert reason.startswith("kv_compression.budget=-5: accepts ")


@pytest.mark.parametrize("typed", ["0.5,0.25", " 0.5, 0.25 ", [0.5, 0.25], (0.5, 0.25)])
def test_a_ladder_may_be_sent_as_it_is_typed(typed: Any) -> None:
    server = KVCompressionConfig(method="lava", budget=(1, 0.5))
    assert server.for_request({"budget": typed}).budget == (0.5, 0.25)


@pytest.mark.parametrize(
    "budget",
    [10**400, [10**400], -(10**400), [0.5] * (MAX_STEPS + 1), list(range(10**6)), "0.5,x"],
    ids=["large", "list", "negative", "many", "very many", "text"],
)
def test_a_budget_that_no_pool_has_is_refused(server: KVCompressionConfig, budget: Any) -> None:
    (reason,) = request_reasons(server, {"budget": budget})
    assert reason.startswith("kv_compression.budget=") and BUDGET_RANGE in reason


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        [[[[[1]]]]] * 1000,
        {str(i): i for i in range(1000)},
        10**5000,
        "\ud800",
        "\n\x00",
    ],
    ids=["long", "nested", "object", "digits", "surrogate", "control"],
)
@pytest.mark.parametrize("place", ["value", "key", "whole"])
def test_what_is_echoed_is_short_and_printable(
    server: KVCompressionConfig, value: Any, place: str
) -> None:
    if place == "key":
        value = {str(value) if not isinstance(value, int) else "9" * 5000: 1}
    found = request_reasons(server, {"budget": value} if place == "value" else value)
    text = "; ".join(found)
    assert text.isascii() and text.isprintable() and len(text) < 2000


def test_a_server_goes_on_where_a_request_has_no_settings(server: KVCompressionConfig) -> None:
    for custom_params in (None, {}, "x", [1], 5, True, {"thinking_budget": 3}, REQUEST_OF_NONE):
        assert server.for_custom_params(custom_params) is server


REQUEST_OF_NONE = {"kv_compression": None}


@pytest.mark.parametrize("method", [m for m, t in METHODS.items() if not t.needs_queries])
def test_a_server_that_compresses_answers_serves_methods_without_queries(method: str) -> None:
    server = KVCompressionConfig(method="lava", decode_interval=128)
    found = server.for_request({"method": method})
    assert (found.method, found.decode_interval) == (method, None)
    assert server.for_request({"budget": 0.5}).decode_interval == 128


def test_a_server_with_a_ladder_says_what_streamingllm_needs() -> None:
    server = KVCompressionConfig(method="lava", budget=(0.5, 0.25))
    (reason,) = request_reasons(server, {"method": "streamingllm"})
    assert reason.startswith("kv_compression.method='streamingllm': accepts it with one kv_comp")
    assert server.for_request({"method": "streamingllm", "budget": 0.3}).budget == (0.3,)
    assert not server.for_request({"enabled": False, "method": "streamingllm"}).enabled


def servers() -> st.SearchStrategy[KVCompressionConfig]:
    """Whatever an operator may have started."""
    budgets = [(0.25,), (64.0,), (0.5, 0.25), (1.0, 0.5, 0.125), (900.0, 100.0)]

    def make(values: dict[str, Any]) -> KVCompressionConfig | None:
        try:
            return KVCompressionConfig.parse(values)
        except KVCompressionError:
            return None

    values = st.fixed_dictionaries(
        {"method": st.sampled_from(METHOD_CHOICES[1:]), "budget": st.sampled_from(budgets)},
        optional={
            "window_size": st.integers(1, 63),
            "decode_interval": st.integers(64, 256),
            "head_floor": st.sampled_from([0.0, 0.3]),
            "uniform_heads": st.booleans(),
            "trigger": st.sampled_from(["always", "pressure"]),
            "scope": st.sampled_from(["suffix", "prompt", "auto"]),
        },
    )
    return values.map(make).filter(lambda made: made is not None)  # type: ignore[return-value]


ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**400, -(10**400), 2**63, -1, 0, 1]),
        st.floats(),
        st.text(st.characters(), max_size=8),
        st.sampled_from(["\ud800", "0.5", "0.5,0.25", "nan,nan", ",", "x" * 5000]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)

SENT = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans() | ODD,
        "method": st.sampled_from(METHOD_CHOICES) | ODD,
        "budget": st.sampled_from([0.5, 1, 33, 64, [0.5, 0.25], [200, 100], "0.5,0.25"]) | ODD,
        "bugdet": ODD,
        "\ud800": ODD,
    },
)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(server=servers(), custom_params=ODD | st.fixed_dictionaries({"kv_compression": SENT | ODD}))
def test_any_json_is_settings_or_an_answer_about_what_was_sent(
    server: KVCompressionConfig, custom_params: Any
) -> None:
    """The fuzzer of a request's settings: nothing but KVCompressionError leaves the check, and it
    names no field that the request did not send."""
    try:
        found = server.for_custom_params(custom_params)
    except KVCompressionError as error:
        assert str(error).isascii() and len(str(error)) < 2000
        sent = custom_params["kv_compression"]
        for reason in error.reasons:
            if not isinstance(sent, dict):
                assert reason.startswith("kv_compression=")
            else:
                named = reason.removeprefix("kv_compression.").partition("=")[0]
                assert named in sent or named == repr("\ud800") or "unknown field" in reason
    else:
        assert found.rungs(1000, 16) is not None and found.budget[0] > 0
        sent = custom_params.get("kv_compression") if isinstance(custom_params, dict) else None
        if not sent:
            assert found == server


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    server=servers(),
    method=st.sampled_from([None, *METHOD_CHOICES[1:]]),
    budget=st.sampled_from([None, 0.5, 1, 20, [0.5, 0.25]]),
)
def test_a_request_is_switched_off_on_every_server(
    server: KVCompressionConfig, method: str | None, budget: Any
) -> None:
    others = {"method": method, "budget": budget}
    sent = {name: value for name, value in others.items() if value is not None}
    assert not server.for_request({"enabled": False, **sent}).enabled


def test_a_request_has_a_ladder_only_where_the_server_has() -> None:
    one, ladder = (KVCompressionConfig(method="lava", budget=b) for b in (0.25, (0.5, 0.25)))
    assert ladder.for_request({"budget": [0.4, 0.2]}).budget == (0.4, 0.2)
    assert ladder.for_request({"budget": 0.4}).budget == (0.4,)
    (reason,) = request_reasons(one, {"budget": [0.4, 0.2]})
    assert reason.startswith("kv_compression.budget=0.4,0.2: accepts one budget on this server")
