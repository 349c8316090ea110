# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.serving` from its options to its JSON; servers and runs take notes."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from benchmarks.serving import __main__ as command
from benchmarks.serving.generator import RequestTimes, Traffic, generator_options
from benchmarks.serving.measurement import Measurement
from benchmarks.serving.server_state import ServerCounters
from tests.unit.test_serving_workloads import Words

LATENCIES = {f"{name}_{p}": 1.0 for name in ("ttft", "tpot", "itl") for p in ("p50", "p99")}


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []

    @contextmanager
    def server(options: list[str], port: int, env: dict[str, str]) -> Any:
        own = options[options.index("--enable-metrics") + 1 :]
        taken.append(f"start {' '.join(w for w in own if 'kv-comp' in w or w == 'lava')} {env}")
        yield SimpleNamespace(url=f"http://{len(taken)}")
        taken.append("stop")

    def measure(url: str, target: Any, load: Any, traffic: Any, repeat: int, seed: int) -> Any:
        taken.append(f"{target.name} {repeat} seed {seed}")
        requests = (RequestTimes(0, 1, 2, 64, traffic.output_tokens),) * len(load)
        counters = ServerCounters(1.0, 64, (0.0,) * 5, None, None)
        return Measurement(
            target.name, repeat, seed, 2.0, requests, LATENCIES, counters, 1, 64, 2048
        )  # fmt: skip

    monkeypatch.setattr(command, "Server", server)
    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "warm_up", lambda url, load: taken.append(f"warm up {url}"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Words())
    return taken


def test_servers_take_turns_and_everything_is_written_down(
    notes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = "--model-path model --prompt-tokens 80 --requests 2 --compare stock lava@0.5 --seed 7"
    command.main([*options.split(), "--json", str(out), "--plot", str(picture)])
    assert notes == [
        "start  {'SGLANG_PLUGINS': 'lava_cpu'}",
        "warm up http://1",
        "stock 0 seed 7",
        "stop",
        "start --kv-compression lava {}",
        "warm up http://5",
        "lava@0.5 0 seed 7",
        "lava@0.5 1 seed 8",
        "stop",
        "start  {'SGLANG_PLUGINS': 'lava_cpu'}",
        "warm up http://10",
        "stock 1 seed 8",
        "stop",
    ]
    report = json.loads(out.read_text())
    assert report["settings"]["request_rate"] is None and report["settings"]["seed"] == 7
    assert [run["target"] for run in report["runs"]] == ["stock", "lava@0.5", "lava@0.5", "stock"]
    assert "commit" in report["machine"] and picture.stat().st_size > 0
    assert "lava@0.5" in capsys.readouterr().out


def test_running_servers_are_used(notes: list[str]) -> None:
    options = ["--model-path", "model", "--prompt-tokens", "80", "--repeats", "1", "--base-url"]
    command.main([*options, "stock=http://a:1", "off=http://b:2/"])
    assert notes == [
        "warm up http://a:1", "stock 0 seed 0", "warm up http://b:2", "off 0 seed 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-url", "stock"], "--base-url stock: accepts TARGET=http://HOST:PORT"),
        (["--compare", "fast"], "--compare fast: accepts stock, "),
        (["--requests", "0"], "--requests=0: accepts a whole number from 1 up"),
    ],
)
def test_a_bad_option_ends_it_with_a_sentence(
    notes: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--model-path", "model", *options])
    assert stopped.value.code == 1 and message in capsys.readouterr().err
    assert notes == []


def test_the_generators_options() -> None:
    traffic = Traffic(64, 0.5, 8, "model")
    words = generator_options("http://a:1", traffic, 3, {"kv_compression": {"enabled": False}})
    options = dict(zip(words[:-2:2], words[1:-2:2], strict=True))
    assert options["--request-rate"] == "0.5" and options["--max-concurrency"] == "8"
    assert options["--sharegpt-output-len"] == "64" and options["--seed"] == "3"
    assert json.loads(options["--extra-request-body"]) == {
        "custom_params": {"kv_compression": {"enabled": False}}
    }
    assert words[-2:] == ["--flush-cache", "--disable-tqdm"]
    plain = generator_options("http://a:1", Traffic(64, float("inf"), None, "model"), 0, None)
    assert plain[plain.index("--request-rate") + 1] == "inf"
    assert "--max-concurrency" not in plain and "--extra-request-body" not in plain
