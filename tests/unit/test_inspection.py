# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang inspect` on a tiny random model: the numbers, the table, the picture, the errors."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from lava_sglang.config import KVCompressionConfig
from lava_sglang.methods import METHOD_CHOICES, METHODS
from lava_sglang.policy import PromptView, keep, method_of
from lava_sglang.tools import cli
from lava_sglang.tools.inspection import run as inspection
from lava_sglang.tools.inspection.kept import KeptPrompt, kept_prompt, runs
from lava_sglang.tools.inspection.plot import save_plot
from lava_sglang.tools.inspection.prefill import load_model, prefill
from lava_sglang.tools.inspection.report import RUN_CHARACTERS, report
from lava_sglang.tools.inspection.settings import InspectionError
from tests.unit.tiny_llama import KV_HEADS, LAYERS, VOCABULARY, random_tokens, write_tiny_llama

WINDOW = 8
PROMPT = random_tokens(120, seed=3)
PNG = b"\x89PNG\r\n\x1a\n"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"

Inspect = Callable[..., int]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of one token a character."""
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    vocabulary = {chr(code): code for code in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompt(model_dir: Path) -> PromptView:
    return prefill(load_model(model_dir), PROMPT, WINDOW).view(WINDOW)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("".join(chr(97 + token % 26) for token in PROMPT))
    return path


@pytest.fixture
def inspect(model_dir: Path, prompt_file: Path, tmp_path: Path) -> Inspect:
    def call(*options: str) -> int:
        common = ["--model-path", str(model_dir), "--prompt-file", str(prompt_file)]
        common += ["--config", '{"window_size": 8}', "--output", str(tmp_path / "kept.png")]
        return cli.main(["inspect", *common, *options])

    return call


def method_named(name: str, **rules: Any) -> Any:
    return method_of(KVCompressionConfig(method=name, window_size=WINDOW, **rules))


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_the_policys(prompt: PromptView, name: str) -> None:
    method = method_named(name)
    kept = kept_prompt(method, prompt, 30)
    selection = keep(method, prompt, 30)
    assert kept.counts == selection.counts.tolist()
    assert [len(heads) for heads in kept.tokens] == [KV_HEADS] * LAYERS
    flat = [token for layer in kept.tokens for head in layer for token in head]
    assert flat == selection.tape_tokens.tolist()
    assert [[len(head) for head in layer] for layer in kept.tokens] == kept.counts
    assert kept.weights == method.layer_weights(method.score(prompt)).tolist()
    assert (kept.method, kept.prompt_len, kept.window_size, kept.budget) == (name, 120, 8, 30)
    assert kept.layer_means == [sum(heads) / KV_HEADS for heads in kept.counts]


def test_the_weights_are_those_that_split_the_budget(prompt: PromptView) -> None:
    kept = kept_prompt(method_named("lava", uniform_layers=True), prompt, 30)
    assert kept.weights == [1.0] * LAYERS
    assert [sum(heads) for heads in kept.counts] == [30 * KV_HEADS] * LAYERS


def test_runs_are_stretches_of_neighbours() -> None:
    assert runs([]) == []
    assert runs([0, 1, 2, 5, 7, 8]) == [range(0, 3), range(5, 6), range(7, 9)]


KEPT = KeptPrompt(
    method="lava",
    prompt_len=40,
    window_size=4,
    budget=10,
    counts=[[6, 18], [8, 8]],
    weights=[0.75, 0.5],
    tokens=[
        [[3, 4, 36, 37, 38, 39], [*range(0, 12), 20, 21, 36, 37, 38, 39]],
        [[0, 1, 2, 3, 36, 37, 38, 39], [5, 7, 9, 11, 36, 37, 38, 39]],
    ],
)


def rendered(kept: KeptPrompt, layer: int, text_of: Callable[[range], str]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(report(kept, layer, text_of))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_report_says_what_is_kept() -> None:
    lines = rendered(KEPT, 0, lambda run: f"text of {run.start}")
    words = [line.split() for line in lines]
    assert "kept          40 of 160 entries (25.0%) in 2 layers of 2 KV heads" in lines
    assert "head budgets  6 to 18 entries" in lines
    heading = ["layer", "entries", "of", "b", "weight", "least", "head", "most", "head"]
    start = words.index(heading)
    assert words[start + 1] == ["0", "24", "120%", "0.750", "6", "0", "18", "1"]
    assert words[start + 2] == ["1", "16", "80%", "0.500", "8", "all", "8", "all"]
    assert "head 0: 2 entries in 1 stretches, the longest 1:" in lines
    assert "head 1: 14 entries in 2 stretches, the longest 2:" in lines
    assert ["3-4", "text", "of", "3"] in words and ["20-21", "text", "of", "20"] in words
    assert not any("text of 36" in line for line in lines)  # the window


def test_long_text_is_shortened_and_never_markup() -> None:
    lines = rendered(KEPT, 1, lambda run: "[bold]" + "word " * 50)
    texts = [line.partition("[bold]")[2] for line in lines if "[bold]" in line]
    assert len(texts) == 5
    assert all(" ... " in text and len(text) <= RUN_CHARACTERS for text in texts)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"kept.{ending}"
    save_plot(KEPT, 1, path)
    assert path.stat().st_size > 5000


def test_inspect_prints_and_draws(
    inspect: Inspect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect("--layer", "1", "--budget", "30") == 0
    picture = tmp_path / "kept.png"
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 5000
    out = capsys.readouterr().out
    assert "122 tokens" in out  # the chat template's two and the text
    assert f"{30 * KV_HEADS * LAYERS} of {122 * KV_HEADS * LAYERS} entries" in out
    assert "What layer 1 keeps" in out
    assert out.replace("\n", "").endswith(f"The picture is in {picture}")


def test_inspect_takes_every_method_and_raw_text(
    inspect: Inspect, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in METHOD_CHOICES[1:]:
        assert inspect("--method", method, "--no-chat-template") == 0
        out = capsys.readouterr().out
        assert "120 tokens" in out and f"What layer {LAYERS // 2} keeps" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-file", "absent.txt"], "--prompt-file=absent.txt: accepts a text file"),
        (["--layer", "3"], "--layer=3: accepts 0 to 2"),
        (["--layer", "-1"], "--layer=-1: accepts 0 to 2"),
        (["--budget", "200"], "--budget=200: keeps all 122 tokens of the prompt, accepts what"),
        (["--budget", "1"], "--budget=1: keeps all 122 tokens"),
        (["--budget", "-1"], "--budget=-1: accepts a fraction of the suffix in (0, 1]"),
        (["--config", "{"], "--config='{': accepts a JSON object"),
        (["--config", "3"], "--config='3': accepts a JSON object"),
        (["--config", '{"window_size": 0}'], "--config window_size=0: accepts a whole number"),
        (["--config", '{"budget": 0.5}'], "--config budget: set --budget instead"),
        (["--output", "absent/kept.png"], "--output=absent/kept.png: accepts a file in an"),
        (["--output", "kept.xyz"], "--output=kept.xyz: accepts a file in an"),
        (["--model-path", "./absent"], "absent"),
    ],
)
def test_inspect_names_what_is_wrong(
    inspect: Inspect, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert inspect(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("lava-sglang inspect: ") and message in error


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused(
    inspect: Inspect, prompt_file: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    prompt_file.write_text(text)
    assert inspect() == 1
    assert f"--prompt-file={prompt_file}: accepts a file with text" in capsys.readouterr().err


def test_a_short_prompt_is_refused(
    inspect: Inspect, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt_file.write_text("nine char")
    assert inspect("--no-chat-template") == 1
    assert f"--prompt-file={prompt_file}: holds 9 tokens, accepts 10 up" in capsys.readouterr().err
    prompt_file.write_bytes(b"\xff")
    assert inspect() == 1
    assert "accepts UTF-8 text" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    inspect: Inspect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        inspection, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert inspect() == 1
    assert "pip install 'lava-sglang[plot]'" in capsys.readouterr().err


def test_a_model_without_a_chat_template_gets_the_text() -> None:
    tokenizer = SimpleNamespace(chat_template=None, encode=lambda text: [ord(c) for c in text])
    assert inspection.tokenize(tokenizer, "ab", chat_template=True) == [97, 98]


def test_the_last_layer_is_accepted() -> None:
    assert inspection.chosen_layer(2, 3) == 2 and inspection.chosen_layer(None, 3) == 1
    with pytest.raises(InspectionError, match="--layer=3: accepts 0 to 2"):
        inspection.chosen_layer(3, 3)
