# SPDX-License-Identifier: Apache-2.0
"""The conversations of a load: their number, their lengths, what they share."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.workloads import Conversation, LoadShape, conversations, write_dataset
from lava_sglang.tools.passages import PassageError

LETTERS = "abcdefghij"
TEXTS = {
    name: " ".join(name + "".join(LETTERS[int(d)] for d in f"{i:03}") for i in range(900))
    for name in ("alpha", "beta")
}


class Words:
    """A tokenizer: one token a word."""

    chat_template = "yes"

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[number] for number in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user> {messages[0]['content']} <assistant>"


def load_of(seed: int = 0, **changes: Any) -> list[Conversation]:
    values: dict[str, Any] = {
        "workload": "unshared",
        "requests": 4,
        "prompt_tokens": 100,
        "output_tokens": 8,
    }
    return conversations(LoadShape(**values | changes), Words(), TEXTS, seed)


def words_of(conversation: Conversation) -> list[str]:
    return [word for turn in conversation for m in turn for word in m["content"].split()]


@pytest.mark.parametrize("workload", ["unshared", "long-answers"])
def test_unshared_prompts_have_the_asked_length_and_no_passage_twice(workload: str) -> None:
    load = load_of(workload=workload)
    assert [len(words_of(conversation)) + 2 for conversation in load] == [100] * 4
    first_words = [words_of(conversation)[0] for conversation in load]
    assert len(set(first_words)) == 4


@pytest.mark.parametrize(("workload", "role"), [("system-prompt", "system"), ("document", "user")])
def test_a_shared_text_comes_first_and_the_questions_differ(workload: str, role: str) -> None:
    load = load_of(workload=workload)
    texts = [words_of(conversation) for conversation in load]
    assert len({tuple(text[:60]) for text in texts}) == 1
    assert len({tuple(text) for text in texts}) == 4
    assert all(85 <= len(text) + 2 <= 101 for text in texts)
    assert {conversation[0][0]["role"] for conversation in load} == {role}


def test_a_system_prompt_leaves_room_for_own_text() -> None:
    load = load_of(workload="system-prompt", own_tokens=40)
    systems = {conversation[0][0]["content"] for conversation in load}
    own = [conversation[0][1]["content"].split()[:40] for conversation in load]
    assert len(systems) == 1 and len({tuple(text) for text in own}) == 4
    assert all(85 <= len(words_of(conversation)) + 2 <= 101 for conversation in load)
    assert not set(own[0]) & set(systems.pop().split())


def test_a_chat_grows_to_the_asked_length() -> None:
    load = load_of(workload="chat", turns=3, requests=2, prompt_tokens=150)
    assert [len(conversation) for conversation in load] == [3, 3]
    assert [len(words_of(conversation)) + 6 for conversation in load] == [150, 150]
    assert all([m["role"] for m in turn] == ["user"] for turns in load for turn in turns)


def test_the_seed_decides() -> None:
    assert load_of(seed=1) == load_of(seed=1)
    assert load_of(seed=1) != load_of(seed=2)


def test_the_data_set_is_what_sglang_reads(tmp_path: Path) -> None:
    load = load_of(workload="chat", turns=2, requests=2)
    write_dataset(tmp_path / "load.json", load)
    read = json.loads((tmp_path / "load.json").read_text())["conversations"]
    assert [[turn["messages"] for turn in conversation] for conversation in read] == load


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": "none"}, r"--workload=none: accepts one of unshared, "),
        ({"requests": 0}, r"--requests=0: accepts a whole number from 1 up"),
        ({"prompt_tokens": 63}, r"--prompt-tokens=63: accepts a whole number from 64 up"),
        ({"output_tokens": 1}, r"--output-tokens=1: accepts a whole number from 2 up"),
        ({"turns": 2}, r"--turns=2: accepts 1 where --workload is not chat"),
        ({"own_tokens": 69}, r"--own-tokens=69: accepts a whole number from 0 to 68"),
        ({"requests": 50}, r"the load needs 50 passages of 88 tokens: the texts hold 20"),
        (
            {"workload": "chat", "turns": 10},
            r"a passage would have -2 tokens: accepts more --prompt-t",
        ),
    ],
)
def test_a_load_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PassageError, match=message):
        load_of(**changes)
