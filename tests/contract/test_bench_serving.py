# SPDX-License-Identifier: Apache-2.0
"""SGLang's own load generator, driven by bench_serving.py, against a server of two at a time."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_serving
import pytest
from serving.targets import OFF
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lava_sglang.demo.passages import python_topics
from lava_sglang.server_process import Server

FAKE = (sys.executable, str(Path(__file__).parents[1] / "unit" / "fake_server.py"))
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Server([], log_path=tmp_path_factory.mktemp("fake") / "log", command=FAKE) as server:
        yield server.url


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = sorted({word for text in python_topics().values() for word in text.split()})
    model = WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)
    fast.save_pretrained(folder)
    return folder


def run(options: str, tokenizer_dir: str, out: Path) -> list[Any]:
    words = ["--model-path", tokenizer_dir, "--repeats", "1", "--json", str(out)]
    bench_serving.main([*words, *options.split()])
    runs: list[Any] = json.loads(out.read_text())["runs"]
    return runs


def test_two_targets_on_a_running_server(
    url: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--requests 5 --prompt-tokens 80 --output-tokens 6"
    servers = f"--base-url off={url} lava@0.25={url}"
    runs = run(f"{options} {servers}", tokenizer_dir, tmp_path / "out.json")
    assert [found["target"] for found in runs] == ["off", "lava@0.25"]
    for found in runs:
        assert len(found["requests"]) == 5 and found["output_tokens"] == 30
        assert found["peak_decoding"] == 2
        assert {request["output_tokens"] for request in found["requests"]} == {6}
        for request in found["requests"]:
            assert 0 <= request["start"] <= request["first_token"]
            assert request["first_token"] < request["last_token"] <= found["seconds"]
        assert found["latencies"]["tpot_p50"] == pytest.approx(50, rel=0.5)
        assert found["counters"]["prefill_seconds"] == pytest.approx(found["prompt_tokens"] / 1000)
        assert found["pool_slots"] == 200 and found["peak_used_slots"] in (100, 200)
    assert "lava@0.25" in capsys.readouterr().out


def test_a_chat_sends_its_answers_back_and_the_parameters_along(
    url: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    options = "--workload chat --turns 2 --requests 2 --prompt-tokens 120 --output-tokens 4"
    (found,) = run(f"{options} --base-url off={url}", tokenizer_dir, tmp_path / "out.json")
    lengths = sorted(request["prompt_tokens"] for request in found["requests"])
    first, second = lengths[:2], lengths[2:]
    # The answer is the parameters, then a word a token.
    answer = len(json.dumps(OFF).split()) + 3
    assert len(lengths) == 4 and max(first) < min(second)
    assert sum(second) == pytest.approx(2 * sum(first) + 2 * answer, abs=8)
