# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.serving` drives SGLang's load generator, on a server of two at a time."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from benchmarks.serving import __main__ as command
from lava_sglang.tools.client import OFF
from lava_sglang.tools.passages import python_topics
from lava_sglang.tools.server_process import Server

FAKE = (sys.executable, str(Path(__file__).parents[1] / "unit" / "fake_server.py"))
OUTPUT_TOKENS = 16  # 0.8 s: long enough for a sampler that looks twice a second
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


def test_a_chat_with_sglangs_generator(
    url: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = "--workload chat --turns 2 --requests 3 --prompt-tokens 120"
    options += f" --output-tokens {OUTPUT_TOKENS}"
    files = f"--model-path {tokenizer_dir} --json {out} --base-url off={url}"
    command.main([*options.split(), *files.split(), "--repeats", "1"])
    assert "requests decoding at once" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    requests: list[dict[str, Any]] = run["requests"]
    assert len(requests) == 6
    assert {request["output_tokens"] for request in requests} == {OUTPUT_TOKENS}
    for request in requests:
        assert 0 <= request["start"] <= request["first_token"]
        assert request["first_token"] < request["last_token"] <= run["seconds"]
    assert run["peak_decoding"] == 2
    # The server sleeps 50 ms after a token; what a busy machine adds has no bound.
    assert run["latencies"]["tpot_p50"] > 40
    assert run["counters"]["prefill_seconds"] == pytest.approx(run["prompt_tokens"] / 1000)
    assert run["pool_slots"] == 200 and run["peak_used_slots"] in (100, 200)
    # A turn brings its words and the answer before it: the parameters, then a word a token.
    lengths = sorted(request["prompt_tokens"] for request in requests)
    first, second = lengths[:3], lengths[3:]
    answer = len(json.dumps({"kv_compression": OFF}).split()) + OUTPUT_TOKENS - 1
    assert max(first) < min(second)
    assert sum(second) == pytest.approx(2 * sum(first) + 3 * answer, abs=12)
