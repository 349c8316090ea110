# SPDX-License-Identifier: Apache-2.0
"""The demo's prompts, its server's options, and what it prints."""

import io
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lava_sglang.tools.demo import run as demo
from lava_sglang.tools.demo import screen
from lava_sglang.tools.demo.comparison import Comparison, ComparisonSettings, server_options
from lava_sglang.tools.load import ConcurrencyResult, RequestTrace
from lava_sglang.tools.passages import (
    QUESTION,
    PassageError,
    Prompt,
    long_prompts,
    python_topics,
    text_files,
)
from lava_sglang.tools.server_process import Server

FAKE = Path(__file__).with_name("fake_server.py")


class Words:
    """A tokenizer: one token a word, counted from 1 in the order of their first use."""

    def __init__(self, chat_template: str | None):
        self.chat_template = chat_template
        self.ids: dict[str, int] = {}

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user> {messages[0]['content']} <assistant>"

    def decode(self, ids: list[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[number] for number in ids)


def settings(**changes: Any) -> ComparisonSettings:
    values: dict[str, Any] = {
        "model_path": "model",
        "text_dir": None,
        "method": "snapkv",
        "budget": 0.125,
        "requests": 3,
        "prompt_tokens": 2000,
        "max_new_tokens": 4,
        "slots": 4096,
        "port": 0,
        "server_args": (),
    }
    return ComparisonSettings(**values | changes)


def test_prompts_have_the_asked_length_and_each_its_own_passage() -> None:
    words = Words("yes")
    texts = {"a": " ".join(f"a{i}" for i in range(25)), "b": " ".join(f"b{i}" for i in range(10))}
    around = len(QUESTION.split()) + 2
    prompts = long_prompts(words, texts, 3, around + 10)
    assert [prompt.title for prompt in prompts] == ["a", "b", "a (2)"]
    assert {len(prompt.input_ids) for prompt in prompts} == {around + 10}
    text = words.decode(prompts[2].input_ids)
    assert text == f"<user> {' '.join(f'a{i}' for i in range(10, 20))} {QUESTION} <assistant>"


def test_a_model_without_a_chat_format_gets_plain_text() -> None:
    words = Words(None)
    (prompt,) = long_prompts(words, {"a": "one two three"}, 1, len(QUESTION.split()) + 3)
    assert words.decode(prompt.input_ids) == f"one two three {QUESTION}"


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [
        (4, 20, r"--requests=4: accepts a whole number up to 3, .* passages of 8 tokens"),
        (0, 20, r"--requests=0: accepts a whole number from 1 up"),
        (1, 12, r"--prompt-tokens=12: accepts a whole number from 13 up"),
        (1, 99, r"--requests=1: accepts a whole number up to 0"),
    ],
)
def test_too_little_text_is_an_error(count: int, length: int, message: str) -> None:
    texts = {"a": " ".join(f"a{i}" for i in range(25))}
    with pytest.raises(PassageError, match=message):
        long_prompts(Words("yes"), texts, count, length)


def test_python_holds_enough_text() -> None:
    """Words are fewer than tokens, so these are enough in any tokenizer."""
    assert len(long_prompts(Words("yes"), python_topics(), 10, 1000)) == 10


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("not this")
    assert text_files(tmp_path) == {"a": "first", "b": "second"}
    with pytest.raises(PassageError, match=r"holds no \.txt file"):
        text_files(tmp_path / "absent")


def test_the_server_gets_the_settings_and_further_options_win() -> None:
    options = server_options(settings(server_args=("--dtype", "bfloat16")))
    for pair in (
        ["--model-path", "model"],
        ["--kv-compression", "snapkv"],
        ["--kv-compression-budget", "0.125"],
        ["--max-total-tokens", "4096"],
    ):
        at = options.index(pair[0])
        assert options[at : at + 2] == pair
    assert options[-2:] == ["--dtype", "bfloat16"]


def trace(first: float, last: float, text: str, info: dict[str, Any]) -> RequestTrace:
    meta = {"kv_compression": info, "finish_reason": {"type": "stop"}}
    return RequestTrace(first, last, True, 4, text, meta)


def test_report_shows_answers_counts_and_both_peaks() -> None:
    kept = {
        "status": "compressed",
        "prompt_tokens": 2000,
        "shared_prefix_tokens": 24,
        "suffix_tokens": 1976,
        "kept_tokens": 247,
        "slots_freed": 1729,
    }
    skipped = {"status": "skipped", "reason": "no_room", "slots_freed": 0}
    responses = (trace(1, 2, "Red\n[bold]apples", kept), trace(1, 3, "Pears", skipped))
    both = Comparison(
        settings(),
        compressed=ConcurrencyResult(6, 3000, 10.0, responses),
        exact=ConcurrencyResult(2, 4000, 20.0, responses),
    )
    console = Console(file=io.StringIO(), width=100)
    prompts = [Prompt("fruit", [1]), Prompt("more fruit", [2])]
    console.print(demo._answers(prompts, both))
    console.print(demo._summary(both))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1. fruit: 2,000 tokens, 24 shared with other prompts, 247 kept, 1,729 slots" in text
    assert "2. more fruit: served uncompressed (no_room)" in text
    assert text.count("Red [bold]apples") == 2
    lines = [line.split() for line in text.splitlines()]
    assert ["requests", "decoding", "at", "once,", "peak", "(1)", "2", "6"] in lines
    assert ["slots", "held", "by", "requests,", "peak", "(2)", "4,000", "3,000"] in lines
    assert both.ratio == 3


def test_the_demo_from_start_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a server that decodes two requests at a time, whatever it is told."""
    command = (sys.executable, str(FAKE), "--polls", "5")
    fake_server = partial(Server, command=command, log_path=tmp_path / "log")
    monkeypatch.setattr(demo, "Server", fake_server)
    monkeypatch.setattr(demo, "server_options", lambda settings: [])
    prompts = [Prompt(f"text {number}", [9]) for number in range(3)]
    monkeypatch.setattr(demo, "load_prompts", lambda settings: prompts)
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.05)
    console = Console(file=io.StringIO(), width=100)
    demo.run(settings(max_new_tokens=20), console, tmp_path / "out.json")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(r"^Starting the server, \d s: loading weights$", text, re.MULTILINE)
    assert re.search(r"^With snapkv 0\.125, \d s: 1 waiting, 2 decoding, 0 done; 200 ", text, re.M)
    assert "With snapkv 0.125: " in text and "Without compression: " in text
    assert text.count("at most 2 requests decoding at once") == 2
    assert text.rstrip().endswith("The server is stopped.")
    assert "1.0 times as many requests" in text
    assert "1. text 0: 20 tokens, 5 kept, 15 slots freed" in text
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"] and written["settings"]["requests"] == 3
    assert written["ratio"] == 1 and written["on"]["peak_decoding"] == 2
    assert [request["tokens"] for request in written["off"]["requests"]] == [20] * 3


def test_a_file_gets_lines_of_its_width_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=20)
    with screen.live(console) as show:
        show("the picture", "a line that is longer than the console")
        show("the picture", "too early for another line")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "a line that is long…\n"


def test_a_terminal_gets_a_picture_that_disappears() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with screen.live(console) as show:
        show("the picture", "the line")
    assert isinstance(console.file, io.StringIO)
    assert "the picture" in console.file.getvalue()
    assert "the line" not in console.file.getvalue()
