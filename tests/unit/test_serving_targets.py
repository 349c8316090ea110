# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks.serving` compares: the servers' options and the order of the runs."""

import pytest

from benchmarks.serving.targets import Target, in_turn
from lava_sglang.config import KVCompressionError
from lava_sglang.tools.client import OFF


def parse(*names: str) -> list[Target]:
    return [Target.parse(name, "lava") for name in names]


def test_stock_loads_no_plugin_but_the_platform() -> None:
    (stock,) = parse("stock")
    assert stock.server.options == ()
    assert dict(stock.server.env) == {"SGLANG_PLUGINS": "lava_cpu"}
    assert stock.custom_params is None


def test_budgets_and_off_share_one_server() -> None:
    off, quarter, eighth = parse("off", "lava@0.25", "lava@0.125")
    assert off.server == quarter.server == eighth.server
    assert off.server.options == ("--kv-compression", "lava")
    assert off.custom_params == {"kv_compression": OFF}
    assert eighth.custom_params == {"kv_compression": {"budget": 0.125}}


def test_further_settings_and_a_ladder_are_settings_of_the_server() -> None:
    scoped, ladder = parse("lava@0.25:scope=prompt:seed=3", "snapkv@0.5,0.25")
    assert scoped.server.options[-1] == '{"scope": "prompt", "seed": 3}'
    assert scoped.custom_params == {"kv_compression": {"budget": 0.25}}
    assert ladder.server.options == (
        "--kv-compression", "snapkv", "--kv-compression-budget", "0.5,0.25",
    )  # fmt: skip
    assert ladder.custom_params is None


def test_servers_where_nothing_is_compressed() -> None:
    none, below = parse("none", "below-threshold")
    assert none.server.options == ("--kv-compression", "none")
    assert below.server.options[:3] == ("--kv-compression", "lava", "--kv-compression-min-tokens")
    assert int(below.server.options[3]) > 10**6


def test_a_threshold_is_given_to_servers_that_compress() -> None:
    options = [
        Target.parse(name, "lava", 100).server.options for name in ("lava@0.5", "off", "stock")
    ]
    assert options[0] == options[1] == (
        "--kv-compression", "lava", "--kv-compression-min-tokens", "100",
    )  # fmt: skip
    assert options[2] == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", r"--compare fast: accepts stock, none, .* or METHOD@BUDGET with METHOD one of"),
        ("h2o@0.5", r"--compare h2o@0.5: accepts stock"),
        ("lava@0", r"--compare lava@0: budget=0: accepts a fraction"),
        ("lava@half", r"--compare lava@half: budget='half': accepts a fraction"),
        ("lava@0.5:scope=all", r"--compare lava@0.5:scope=all: scope='all': accepts 'suffix'"),
        ("lava@0.5:fast", r"--compare lava@0.5:fast: fast='': unknown field, accepts method, "),
        ("lava@0.25,0.5", r"--compare lava@0.25,0.5: budget=0.25,0.5: accepts .* lower rung"),
    ],
)
def test_another_target_is_refused(name: str, message: str) -> None:
    with pytest.raises(KVCompressionError, match=message):
        parse(name)


def test_servers_take_turns_and_every_second_repeat_goes_backwards() -> None:
    targets = parse("lava@0.25", "stock", "off")
    starts = [[(repeat, t.name) for repeat, t in start] for start in in_turn(targets, 3)]
    assert starts == [
        [(0, "lava@0.25"), (0, "off")],
        [(0, "stock"), (1, "stock")],
        [(1, "off"), (1, "lava@0.25"), (2, "lava@0.25"), (2, "off")],
        [(2, "stock")],
    ]


def test_targets_of_one_server_start_it_once() -> None:
    assert len(in_turn(parse("off", "lava@0.25"), 5)) == 1
