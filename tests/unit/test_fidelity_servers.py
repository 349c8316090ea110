# SPDX-License-Identifier: Apache-2.0
"""What the fidelity benchmarks send to a server and make of its answers, without a server."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.fidelity import later_turn, needle
from benchmarks.fidelity.contexts import Cutter, Texts
from benchmarks.fidelity.later_turn import (
    AFTER,
    CHAT,
    DOCUMENT,
    EVICTED,
    INSIDE,
    KEPT,
    Dialogue,
    cells,
    conversations,
)
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.server import Reply, ask
from lava_sglang.tools.client import ServerClient
from tests.unit.tiny_llama import write_tiny_llama
from tests.unit.tiny_tokenizer import tiny_tokenizer, write_tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = 7
TOKENIZER.eos_token = TOKENIZER.convert_ids_to_tokens(END)
SENTENCES = "".join(f"In the year {year} it rained, and the king slept. " for year in range(300))


class FakeServer:
    """Answers every question about a code with the code it finds in the prompt; remembers."""

    def __init__(self, url: str = "") -> None:
        self.log: list[str] = []
        self.prompts: list[list[int]] = []
        self.settings: list[Mapping[str, Any]] = []
        self.reason = ""  # why it compresses nothing

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, kv_compression: Mapping[str, Any]
    ) -> dict[str, Any]:
        self.log.append("generate")
        self.prompts.append(list(prompt))
        self.settings.append(dict(kv_compression))
        text = TOKENIZER.decode(prompt)
        answer = "Well said."
        if "secret code of" in text.rsplit("[assistant]", 1)[1]:
            key = text.rsplit(" of ", 1)[1].removesuffix(":")
            answer = text.split(f"The secret code of {key}: ")[1].split(".")[0]
        ids = TOKENIZER.encode(answer)
        found = {"status": "compressed", "kept_tokens": 40}
        if "enabled" in kv_compression or self.reason:
            found = {"status": "skipped", "reason": self.reason or "disabled"}
        meta = {"kv_compression": found, "cached_tokens": 0}
        return {"text": f" {answer}", "output_ids": [*ids, END], "meta_info": meta}

    def flush_cache(self) -> None:
        self.log.append("flush")

    def scope(self) -> str:
        return "suffix"


@pytest.fixture
def cutter() -> Cutter:
    return Cutter(TOKENIZER, Texts({"rain": SENTENCES}, []))


def test_a_fact_is_told_in_one_turn_and_asked_for_in_the_last(cutter: Cutter) -> None:
    found = list(conversations(cutter, [DOCUMENT, CHAT], ["digits3", "digits5"], [1500], 6))
    assert len({conversation.name for conversation in found}) == 12
    assert [len(conversation.pieces) for conversation in found[:2]] == [2, 5]
    for conversation in found:
        pieces = [TOKENIZER.decode(piece) for piece in conversation.pieces]
        fact = f": {conversation.answer}."
        assert sum(fact in piece for piece in pieces) == 1
        for piece in pieces[:-1]:
            assert piece.endswith("in one sentence.\n[assistant]")
        assert pieces[-1].startswith("\n[user]What is the secret code of ")
        assert pieces[-1].rsplit("[assistant]", 1)[1].startswith("The secret code of ")
        single = TOKENIZER.decode(conversation.single)
        assert len(conversation.single) == 1500 and fact in single
        assert len(conversation.answer_ids) == 1 + len(conversation.answer)


def test_a_dialogue_is_the_same_with_the_tree_kept_and_evicted(cutter: Cutter) -> None:
    (chat,) = conversations(cutter, [CHAT], ["digits5"], [1500], 1)
    server = FakeServer()
    records = Dialogue(server, chat, TOKENIZER, "lava", 128).records()  # type: ignore[arg-type]
    turns = ["generate"] * 4
    assert server.log == ["flush", "generate", "flush", *turns, "generate", "flush", "generate"]
    assert [record["turn"] for record in records] == [INSIDE, KEPT, EVICTED]
    assert all(record["exact_match"] == 1 for record in records)
    assert all(settings == {"method": "lava", "budget": 128} for settings in server.settings)
    inside, *history, kept, evicted = server.prompts
    assert inside == chat.single
    assert kept == evicted
    reply = TOKENIZER.encode("Well said.")
    assert history[0] == chat.pieces[0]
    for earlier, later, piece in zip(history, [*history[1:], kept], chat.pieces[1:], strict=True):
        assert later == earlier + reply + piece, "the end token belongs to the chat format"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    write_tiny_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = TOKENIZER.eos_token
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = tmp_path_factory.mktemp("data")
    (data / "rain.txt").write_text(SENTENCES)
    return ["--model-path", str(folder), "--data", str(data), "--device", "cpu"]


def test_later_turn_asks_in_four_ways(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later_turn, "ServerClient", FakeServer)
    path = tmp_path / "run.jsonl"
    run = ["--url", "http://a", "--conversations", "1", "--lengths", "900", "--budgets", "64"]
    later_turn.main([*options, *run, "--results", str(path)])
    records = [json.loads(line) for line in path.read_text().splitlines()][1:]
    found = cells(records)
    assert list(found) == [
        (form, turn, None if turn == AFTER else "suffix")
        for form in (CHAT, DOCUMENT)
        for turn in (INSIDE, AFTER, KEPT, EVICTED)
    ]
    for (_, turn, _), by_choice in found.items():
        assert ("lava_span", 64) in by_choice
        if turn != AFTER:  # a random model knows nothing
            assert by_choice["full", None].value == by_choice["lava_span", 64].value == 1
    monkeypatch.setattr(later_turn, "Dialogue", None)
    later_turn.main([*options, *run, "--results", str(path)])
    assert len(path.read_text().splitlines()) == 1 + len(records)


def test_needles_on_a_server(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    monkeypatch.setattr(needle, "ServerClient", lambda url: server)
    path = tmp_path / "run.jsonl"
    run = ["--server", "http://a", "--needles", "2", "--lengths", "900", "--budgets", "64"]
    summary = tmp_path / "summary.json"
    files = ["--results", str(path), "--json", str(summary)]
    needle.main([*options, *run, "--methods", "lava", *files])
    report = json.loads(summary.read_text())
    assert report["server"] == "http://a" and "device" not in report
    results = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert len(results) == 2 * 4 * 2
    assert all(record["exact_match"] == 1 for record in results)
    assert server.log == ["flush", "generate"] * 16
    assert {len(prompt) for prompt in server.prompts} == {900}
    server.reason = "too_short"
    with pytest.raises(RuntimeError, match="the server did not compress it: too_short"):
        needle.main([*options, *run, "--methods", "snapkv", "--results", str(path)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lava:pool_width=15"], r"--methods lava:pool_width=15: accepts lava, "),
        (["--config", '{"pool_width": 15}'], "--config and --methods-from: not with --server"),
        (["--methods-from", "mine.py"], "--config and --methods-from: not with --server"),
    ],
)
def test_settings_of_methods_belong_to_the_server(
    options: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    server = FakeServer()
    monkeypatch.setattr(needle, "ServerClient", lambda url: server)
    with pytest.raises(ValueError, match=message):
        needle.main([*options, "--server", "http://a", *more])
    assert server.log == []


def test_the_outcome_of_compression_is_read() -> None:
    outcome = {"status": "compressed", "kept_tokens": 33, "shared_prefix_tokens": 0}

    def handler(request: httpx.Request) -> httpx.Response:
        meta = {"kv_compression": outcome, "cached_tokens": 5}
        return httpx.Response(200, json={"text": "ok", "output_ids": [1], "meta_info": meta})

    with ServerClient("http://a", transport=httpx.MockTransport(handler)) as server:
        assert ask(server, [1, 2, 3], 4, {"budget": 33}) == Reply("ok", [1], 5, True, 33, "")
        outcome.clear()
        outcome.update(status="skipped", reason="too_short")
        assert ask(server, [1, 2, 3], 4, {}) == Reply("ok", [1], 5, False, 3, "too_short")


def test_results_hold_no_history_but_of_the_exact_cache(cutter: Cutter) -> None:
    (chat,) = conversations(cutter, [CHAT], ["digits3"], [900], 1)
    results = Results(None, later_turn.KEY_FIELDS, {})
    for method, budget in (("full", None), ("lava", 64)):
        dialogue = Dialogue(FakeServer(), chat, TOKENIZER, method, budget)  # type: ignore[arg-type]
        for record in dialogue.records():
            results.add({**record, "scope": "suffix"})
    assert [("history" in record) for record in results] == [False, False, True] + [False] * 3
