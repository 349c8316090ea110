# SPDX-License-Identifier: Apache-2.0
"""The in-process commands from end to end on a tiny random model: records, resume, summaries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import divergence, needle
from benchmarks.fidelity.results import Results
from lava_sglang.methods import METHODS

SENTENCE = "The clerk of number {} wrote a letter, and nobody answered it. "
ROW = {"_id": "r1", "context": "", "input": "Who wrote?", "answers": ["The clerk"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = "".join(SENTENCE.format(number) for number in range(40))
    (folder / "book.txt").write_text(text)
    (folder / "qasper.jsonl").write_text(json.dumps(ROW | {"context": text}) + "\n")
    return folder


@pytest.fixture
def options(model_dir: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model-path", str(model_dir), "--data", str(data), "--device", "cpu"),
        *("--config", '{"window_size": 16}', "--budgets", "24,0.25,1.0"),
        *("--results", str(tmp_path / "run.jsonl"), "--json", str(tmp_path / "summary.json")),
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()][1:]


def test_divergence_measures_every_choice_once(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--contexts", "2", "--lengths", "160", "--new-tokens", "20"]
    divergence.main([*options, *run, "--methods", "lava", "random"])
    found = records(tmp_path)
    assert [(r["source"], r["prompt_tokens"]) for r in found if r["method"] == "full"] == [
        ("book", 160),
        ("qasper", 160),
    ]
    assert len(found) == 2 * (1 + 2 * 3)
    kl = {(r["source"], r["method"], r["budget"]): r["kl"] for r in found if r["method"] != "full"}
    kept = {r["budget"]: r["kept_tokens"] for r in found}
    assert kept == {None: 160, 24: 24, 0.25: 40, 1: 160}
    for source in ("book", "qasper"):
        assert abs(kl[source, "lava", 1]) < 1e-6, "nothing is dropped"
        assert kl[source, "lava", 0.25] > 1e-3
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["machine"] and written["commit"] and written["device"] == "cpu"
    summary = written["summary"]
    assert summary["contexts"] == 2
    cell = summary["groups"]["book"]["0.25"]["random"]
    expected = kl["book", "random", 0.25] / kl["book", "lava", 0.25]
    assert cell["ratio"]["value"] == pytest.approx(expected)
    assert cell["kl"]["value"] == pytest.approx(kl["book", "random", 0.25])

    # The same again computes nothing; another method costs only itself, on the same continuation.
    calls: list[int] = []
    compare = divergence.compare
    monkeypatch.setattr(divergence, "compare", lambda *a: calls.append(1) or compare(*a))
    monkeypatch.setattr(divergence, "greedy", None)
    divergence.main([*options, *run, "--methods", "lava", "random"])
    assert calls == [] and records(tmp_path) == found
    divergence.main([*options, *run, "--methods", "lava", "snapkv:pool_width=3"])
    assert len(calls) == 2 * 3
    assert records(tmp_path)[: len(found)] == found


def test_divergence_of_a_short_answer_is_left_out(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "greedy", lambda *_: [1, 2, 3])
    divergence.main([*options, "--contexts", "2", "--lengths", "160", "--methods", "lava"])
    skipped = {r["source"]: r["skipped"] for r in records(tmp_path) if r["method"] == "full"}
    assert skipped == {"book": False, "qasper": True}
    assert {r["source"] for r in records(tmp_path) if r["method"] == "lava"} == {"book"}


def test_needle_measures_both_questions(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--needles", "2", "--lengths", "300", "--kinds", "digits3", "--methods", "lava"]
    needle.main([*options, *run])
    found = records(tmp_path)
    assert len(found) == 2 * 2 * (1 + 3)
    nll = {(r["needle"], r["question"], r["method"], r["budget"]): r["nll"] for r in found}
    for record in found:
        full = nll[record["needle"], record["question"], "full", None]
        if record["budget"] == 1:
            assert record["nll"] == pytest.approx(full, abs=1e-4), "nothing is dropped"
        elif record["method"] == "lava":
            assert abs(record["nll"] - full) > 1e-4
        # The same tokens, and the whole prompt: where the question stands makes no difference.
        other = "after" if record["question"] == "inside" else "inside"
        if record["method"] == "full":
            assert full == pytest.approx(nll[record["needle"], other, "full", None], abs=1e-4)
    monkeypatch.setattr(needle, "prefill", None)
    needle.main([*options, *run])
    assert records(tmp_path) == found


def test_an_answer_is_scored_from_its_second_token() -> None:
    probabilities = torch.tensor([[0.1, 0.1, 0.8], [0.5, 0.3, 0.2], [0.25, 0.5, 0.25]])
    found = needle.score_answer(probabilities.log(), [2, 0, 1])
    assert found == {"exact_match": 1.0, "nll": pytest.approx(0.6931472)}
    assert needle.score_answer(probabilities.log(), [2, 0, 2])["exact_match"] == 0.0
    assert needle.score_answer(probabilities.log(), [1, 0, 1])["exact_match"] == 1.0


def test_bad_methods_and_budgets_are_named(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"method 'lru': accepts lava, .*snapkv"):
        divergence.main([*options, "--methods", "lru"])
    with pytest.raises(ValueError, match="lava: pool_width=4: accepts an odd number"):
        divergence.main([*options, "--methods", "lava:pool_width=4"])
    with pytest.raises(SystemExit):
        divergence.main([*options, "--budgets", "64,1.5"])
    assert "budget '1.5': accepts a fraction in (0, 1]" in capsys.readouterr().err


def test_a_budget_within_the_window_is_left_out(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so; the other pairs of the sweep are measured."""
    wide = "lava_span:window_size=24"
    methods = ["--methods", "lava", wide]
    divergence.main([*options, *methods, "--contexts", "1", "--lengths", "160"])
    left_out = f"Left out: {wide}: --budgets 24: must exceed its window 24"
    assert capsys.readouterr().err.splitlines().count(left_out) == 1
    pairs = [(r["method"], r["budget"]) for r in records(tmp_path) if r["method"] != "full"]
    assert pairs == [("lava", 24), ("lava", 0.25), ("lava", 1), (wide, 0.25), (wide, 1)]

    needles = ["--needles", "1", "--lengths", "300", "--kinds", "digits3", "--no-resume"]
    needle.main([*options, *methods, *needles])
    assert left_out in capsys.readouterr().err.splitlines()
    found = {(r["method"], r["budget"]) for r in records(tmp_path) if r["method"] != "full"}
    assert found == set(pairs)


def test_budgets_all_within_the_window_are_refused(options: list[str]) -> None:
    run = [*options, "--budgets", "8,16", "--methods", "lava", "lava_span:window_size=20"]
    with pytest.raises(ValueError, match="lava: --budgets 8,16: must exceed its window 16; lava_s"):
        divergence.main(run)


def test_methods_of_a_file(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from lava_sglang.methods import METHODS, MethodTraits\n"
        "from lava_sglang.policy import Method\n"
        "class Newest(Method):\n"
        "    def score(self, prompt):\n"
        "        order = torch.arange(prompt.scored_len, dtype=torch.float32)\n"
        "        return order.expand(prompt.num_layers, prompt.num_kv_heads, -1)\n"
        "METHODS['newest'] = MethodTraits('mine:Newest', 'the newest', needs_queries=False)\n"
    )
    mine = ["--methods-from", str(tmp_path / "mine.py"), "--methods", "newest", "streamingllm"]
    # Without sinks StreamingLLM is the newest entries.
    streaming = [*mine[:-1], "streamingllm:sink_tokens=0"]
    try:
        divergence.main([*options, *streaming, "--contexts", "1", "--lengths", "160"])
    finally:
        METHODS.pop("newest", None)
    kl = {(r["method"], r["budget"]): r["kl"] for r in records(tmp_path) if r["method"] != "full"}
    assert kl["newest", 24] == pytest.approx(kl["streamingllm:sink_tokens=0", 24], rel=1e-4)


def test_results_in_memory_only(options: list[str], tmp_path: Path) -> None:
    without = options[: options.index("--results")]
    divergence.main([*without, "--contexts", "1", "--lengths", "160", "--methods", "random"])
    assert not (tmp_path / "run.jsonl").exists()
    assert len(Results(None, ("context",), {})) == 0
