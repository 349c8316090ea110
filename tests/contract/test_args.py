# SPDX-License-Identifier: Apache-2.0
"""The options reach every process by every way in; bad ones end the start with a full list."""

import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sglang.srt.server_args as server_args_module
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.runtime_context import get_memory
from sglang.srt.server_args import prepare_server_args

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.integration import plugin
from lava_sglang.integration.args import LavaServerArgs, config_of
from lava_sglang.integration.scheduler import LavaScheduler
from lava_sglang.methods import COMPETING_METHODS
from tests.contract.resolving import start_reasons

pytestmark = pytest.mark.usefixtures("plugin_installed")

ROOT = Path(__file__).parents[2]
FIELDS = (
    "kv_compression",
    "kv_compression_budget",
    "kv_compression_min_tokens",
    "kv_compression_config",
)
OPTIONS = {
    "kv_compression": "snapkv",
    "kv_compression_budget": 0.5,
    "kv_compression_min_tokens": 100,
    "kv_compression_config": {"window_size": 16, "scope": "prompt", "seed": 7},
}
CONFIG = KVCompressionConfig(
    method="snapkv", budget=0.5, min_tokens=100, window_size=16, scope="prompt", seed=7
)
COMMAND_LINE = [
    "--kv-compression",
    "snapkv",
    "--kv-compression-budget",
    "0.5",
    "--kv-compression-min-tokens",
    "100",
    "--kv-compression-config",
    '{"window_size": 16, "scope": "prompt", "seed": 7}',
]


def test_our_record_stands_in_sglangs_place() -> None:
    assert server_args_module.ServerArgs is LavaServerArgs
    stock = LavaServerArgs.__base__
    assert stock is not None
    theirs = stock.__struct_fields__
    assert LavaServerArgs.__struct_fields__ == (*theirs, *FIELDS)  # positional calls still work


def test_the_command_line(model: str) -> None:
    args = prepare_server_args(["--model-path", model, "--device", "cpu", *COMMAND_LINE])
    assert type(args) is LavaServerArgs
    assert {name: getattr(args, name) for name in FIELDS} == OPTIONS
    args.resolve_once()
    assert config_of(args) == CONFIG


@pytest.mark.parametrize("nested", [True, False], ids=["mapping", "JSON string"])
def test_the_config_file(model: str, tmp_path: Path, nested: bool) -> None:
    options: dict[str, Any] = {
        "model-path": model,
        "device": "cpu",
        **{name.replace("_", "-"): value for name, value in OPTIONS.items()},
    }
    if not nested:
        options["kv-compression-config"] = json.dumps(options["kv-compression-config"])
    path = tmp_path / "server.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    assert config_of(prepare_server_args(["--config", str(path)])) == CONFIG
    louder = prepare_server_args(["--config", str(path), "--kv-compression-budget", "0.75"])
    assert louder.kv_compression_budget == 0.75


def test_keywords_as_the_engine_passes_them(model: str) -> None:
    args = LavaServerArgs(model_path=model, device="cpu", **OPTIONS)
    args.resolve_once()
    assert config_of(args) == CONFIG


def test_an_engine_that_is_imported_takes_our_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class attribute was bound before the plugin was loaded."""
    engine = ModuleType("sglang.srt.entrypoints.engine")
    engine.Engine = type("Engine", (), {"server_args_class": object})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    plugin.register()
    assert engine.Engine.server_args_class is LavaServerArgs


def test_the_defaults_are_off(model: str) -> None:
    args = prepare_server_args(["--model-path", model, "--device", "cpu"])
    args.resolve_once()
    assert config_of(args) == KVCompressionConfig()


def test_the_settings_show_in_server_info(model: str) -> None:
    args = LavaServerArgs(model_path=model, device="cpu", **OPTIONS)
    args.resolve_once()
    shown = args.resolved_dict()
    assert {name: shown[name] for name in FIELDS} == OPTIONS
    json.dumps({name: shown[name] for name in FIELDS})


def test_the_settings_are_published(runtime_context: None) -> None:
    assert get_memory().kv_compression == "none"
    assert get_memory().kv_compression_budget == 0.25


def test_help_names_the_methods_that_a_head_floor_is_for() -> None:
    parser = argparse.ArgumentParser()
    LavaServerArgs.add_cli_args(parser)
    assert ", ".join(COMPETING_METHODS) in " ".join(parser.format_help().split())


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare_server_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in shown
    assert "{none,lava,lava_span,adakv,pyramidkv,snapkv,streamingllm,random}" in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--kv-compression", "lru"),
        ("--kv-compression-min-tokens", "1.5"),
        ("--kv-compression-config", "{window_size: 32}"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_parser(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare_server_args(["--model-path", "dummy", option, value])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert option in shown and repr(value) in shown


def test_all_bad_values_are_told_at_once(model: str) -> None:
    found = start_reasons(
        model,
        kv_compression="lru",
        kv_compression_budget=-1.0,
        kv_compression_min_tokens=0,
        kv_compression_config={"window_size": 0, "pool_width": 2, "scope": "x", "speed": 1},
    )
    assert sorted(reason.partition("=")[0] for reason in found) == [
        "--kv-compression",
        "--kv-compression-budget",
        "--kv-compression-config pool_width",
        "--kv-compression-config scope",
        "--kv-compression-config speed",
        "--kv-compression-config window_size",
        "--kv-compression-min-tokens",
    ]


def test_bad_values_and_features_are_told_at_once(model: str) -> None:
    found = start_reasons(
        model,
        kv_compression="snapkv",
        kv_compression_min_tokens=-2,
        pp_size=2,
        enable_mixed_chunk=True,
        enable_hierarchical_cache=True,
    )
    assert len(found) == 4
    words = ("--kv-compression-min-tokens=-2", "pipeline", "mixed", "HiCache")
    for word, reason in zip(words, found, strict=True):
        assert word in reason


@pytest.mark.parametrize(
    "options",
    [
        {"cuda_graph_backend_prefill": "full"},
        # SGLang lets the JSON win over the option.
        {"cuda_graph_config": {"prefill": {"backend": "full"}}},
    ],
    ids=["option", "JSON"],
)
def test_a_full_prefill_graph_is_refused(model: str, options: dict[str, Any]) -> None:
    (reason,) = start_reasons(model, kv_compression="snapkv", **options)
    assert reason.startswith("full CUDA graphs for prefill is not supported")


def test_bad_values_are_refused_also_where_compression_is_off(model: str) -> None:
    (reason,) = start_reasons(model, kv_compression_budget=0.0)
    assert reason.startswith("--kv-compression-budget=0: accepts ")


def test_features_are_served_where_compression_is_off(model: str) -> None:
    args = LavaServerArgs(model_path=model, device="cpu", enable_mixed_chunk=True)
    args.resolve_once()
    assert config_of(args).enabled is False


@pytest.mark.parametrize("name", ["method", "budget", "min_tokens"])
def test_a_setting_has_one_home(name: str) -> None:
    args = LavaServerArgs(model_path="dummy", kv_compression_config={name: 1})
    with pytest.raises(KVCompressionError, match=f"config {name}=1: set --kv-compression"):
        config_of(args)


@pytest.mark.parametrize("value", [[], [1], 0, 3, False, "", "{}"], ids=repr)
def test_the_further_settings_are_an_object(value: Any) -> None:
    args = SimpleNamespace(
        kv_compression="snapkv",
        kv_compression_budget=0.25,
        kv_compression_min_tokens=512,
        kv_compression_config=value,
    )
    with pytest.raises(KVCompressionError) as caught:
        config_of(args)
    assert caught.value.reasons == [f"--kv-compression-config={value!r}: accepts a JSON object"]


def test_a_key_that_is_no_name_is_refused() -> None:
    """Only a program can pass it: JSON has none."""
    args = LavaServerArgs(model_path="dummy", kv_compression_config={1: 2})
    with pytest.raises(KVCompressionError, match="--kv-compression-config 1=2"):
        config_of(args)


def test_an_unknown_key_is_answered_with_those_that_belong_there() -> None:
    """method, budget and min_tokens are options of their own, refused in the JSON."""
    args = SimpleNamespace(**OPTIONS | {"kv_compression_config": {"windw_size": 16}})
    with pytest.raises(KVCompressionError, match="windw_size=16: unknown field") as caught:
        config_of(args)
    offered = str(caught.value).partition("accepts ")[2].split(", ")
    assert {*offered, "method", "budget", "min_tokens"} == set(KVCompressionConfig.model_fields)


def test_a_config_that_is_no_json_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model-path", model, "--kv-compression-config", "{window_size: 16}"]
    with pytest.raises(SystemExit):
        prepare_server_args(options)
    assert "--kv-compression-config: '{window_size: 16}': accepts a JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ""),
        ({"kv_compression_budget": 0.5}, "--kv-compression-budget"),
        (
            {"kv_compression_min_tokens": 9, "kv_compression_config": {"scope": "prompt"}},
            "--kv-compression-min-tokens, --kv-compression-config scope",
        ),
    ],
)
def test_settings_without_a_method_are_told_to_be_idle(
    model: str, options: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    LavaServerArgs(model_path=model, device="cpu", **options).resolve_once()
    told = [text for text in caplog.messages if "no effect without --kv-compression" in text]
    assert told == ([f"Of no effect without --kv-compression METHOD: {named}"] if named else [])


def test_a_budget_below_the_window_names_its_own_option() -> None:
    args = LavaServerArgs(model_path="dummy", kv_compression_budget=16.0)
    with pytest.raises(KVCompressionError) as caught:
        config_of(args)
    (reason,) = caught.value.reasons
    assert reason.startswith("--kv-compression-budget=16: ") and "window_size=32" in reason


CHILD = """
import json, pickle, sys
started_with_us = [name for name in sys.modules if name.startswith("lava_sglang")]
target, args = pickle.load(open(sys.argv[1], "rb"))
stock = pickle.load(open(sys.argv[2], "rb"))
from lava_sglang.config import KVCompressionError
from sglang.srt.plugins.hook_registry import HookRegistry
import sglang.srt.managers.scheduler as scheduler, sglang.srt.server_args as server_args
import importlib.metadata
report = {
    "started_with_us": started_with_us,
    "target": target.__module__ + "." + target.__name__,
    "class": type(args).__module__ + "." + type(args).__name__,
    "fields": {name: getattr(args, name) for name in FIELDS},
    "resolved": args._resolution_finished,
    "stock": stock.kv_compression,
    "server_args": server_args.ServerArgs.__name__,
    "scheduler": scheduler.Scheduler.__name__,
    "patched": sorted(HookRegistry._patched),
}
importlib.metadata.version = lambda name: "0.6.0"
try:
    pickle.load(open(sys.argv[1], "rb"))
    report["broken"] = "served"
except KVCompressionError as error:
    report["broken"] = error.reasons
report["stock in a broken install"] = pickle.load(open(sys.argv[2], "rb")).kv_compression
print("REPORT" + json.dumps(report))
"""


def test_a_child_process_installs_the_plugin_or_fails(model: str, tmp_path: Path) -> None:
    """As SGLang starts a scheduler: a fresh process unpickles its target, then the arguments."""
    args = LavaServerArgs(model_path=model, device="cpu", **OPTIONS)
    stock = LavaServerArgs(model_path=model, device="cpu")
    args.resolve_once()
    stock.resolve_once()
    paths = tmp_path / "compressing", tmp_path / "stock"
    paths[0].write_bytes(pickle.dumps((run_scheduler_process, args)))
    paths[1].write_bytes(pickle.dumps(stock))
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD.replace("FIELDS", repr(FIELDS)), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    report = json.loads(child.stdout.partition("REPORT")[2])
    assert report["started_with_us"] == []
    assert report["target"] == "sglang.srt.managers.scheduler.run_scheduler_process"
    assert report["class"] == "lava_sglang.integration.args.LavaServerArgs"
    assert report["fields"] == OPTIONS and report["resolved"] is True
    assert (report["server_args"], report["scheduler"]) == ("LavaServerArgs", "LavaScheduler")
    assert {
        "sglang.srt.server_args.ServerArgs",
        "sglang.srt.managers.scheduler.Scheduler",
    } <= set(report["patched"])
    assert report["broken"] == ["sglang==0.6.0 is installed: needs sglang==0.5.23"]
    assert report["stock"] == report["stock in a broken install"] == "none"


class Stock:
    """In the place of SGLang's scheduler."""

    def __init__(self, server_args: Any, port_args: Any, *, gpu_id: int) -> None:
        self.built_with = (server_args, port_args, gpu_id)


class Replacement(Stock):
    """In the place of ours."""

    __new__: Any = LavaScheduler.__new__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a stock scheduler is not built by us")


def test_without_compression_a_stock_scheduler_is_made() -> None:
    """Invariant 2: none of our code is in it."""
    args = SimpleNamespace(kv_compression="none")
    made = Replacement(args, "ports", gpu_id=3)
    assert type(made) is Stock
    assert made.built_with == (args, "ports", 3)


def test_with_compression_ours_is_made() -> None:
    made = LavaScheduler.__new__(LavaScheduler, SimpleNamespace(kv_compression="snapkv"))
    assert type(made) is LavaScheduler


def test_the_options_are_a_group_of_sglangs_own_parser() -> None:
    parser = argparse.ArgumentParser()
    server_args_module.ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(["--model-path", "dummy", "--kv-compression", "random"])
    args = server_args_module.ServerArgs.from_cli_args(parsed)
    assert type(args) is LavaServerArgs and args.kv_compression == "random"
