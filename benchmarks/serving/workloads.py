# SPDX-License-Identifier: Apache-2.0
"""Conversations made from real texts, in the format of SGLang's `agentic-trace` data set."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lava_sglang.tools.passages import QUESTION, PassageError, passages

LONG_QUESTION = "Explain this text in detail, one paragraph after another, with examples."
WORD_QUESTION = "What does the text say about {word!r}? Answer in one or two sentences."

Message = dict[str, str]
Turn = list[Message]
Conversation = list[Turn]

WORKLOADS = {
    "unshared": "prompts that share nothing",
    "system-prompt": "one long system prompt, a short question each",
    "document": "one document, a question each about it",
    "chat": "conversations that grow by a passage and a question a turn",
    "long-answers": "as unshared, with a question that asks for a long answer",
}


@dataclass(frozen=True)
class LoadShape:
    """What is asked. Raises PassageError for a number that no load can have."""

    workload: str  # one of WORKLOADS
    requests: int  # conversations, where a conversation has several turns
    prompt_tokens: int  # of a prompt; of the last prompt of a chat, without the answers
    output_tokens: int  # of each answer, exactly
    turns: int = 1  # of a chat
    own_tokens: int = 0  # of system-prompt: text of its own that each request adds

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            accepted = ", ".join(WORKLOADS)
            raise PassageError(f"--workload={self.workload}: accepts one of {accepted}")
        least = {"requests": 1, "prompt_tokens": 64, "output_tokens": 2, "turns": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                option = "--" + name.replace("_", "-")
                raise PassageError(
                    f"{option}={getattr(self, name)}: accepts a whole number from {minimum} up"
                )
        if self.workload != "chat" and self.turns != 1:
            raise PassageError(f"--turns={self.turns}: accepts 1 where --workload is not chat")
        if not 0 <= self.own_tokens <= self.prompt_tokens - 32:
            raise PassageError(
                f"--own-tokens={self.own_tokens}: accepts a whole number from 0 to "
                f"{self.prompt_tokens - 32}"
            )

    @property
    def shared(self) -> bool:
        """Whether requests have a long prefix in common."""
        return self.workload in ("system-prompt", "document", "chat")


def conversations(
    shape: LoadShape, tokenizer: Any, texts: Mapping[str, str], seed: int
) -> list[Conversation]:
    """The new messages of every turn of every conversation; answers come from the server.

    A prompt's length is `shape.prompt_tokens` up to the tokens that meet at the edges of its
    parts. tokenizer: of transformers. Raises PassageError if the texts are too short.
    """
    chooser = random.Random(seed)

    def cut(count: int, size: int, question: str) -> list[str]:
        return _texts(tokenizer, texts, count, size - _overhead(tokenizer, question), chooser)

    if shape.workload == "system-prompt":
        own = ["" for _ in range(shape.requests)]
        if shape.own_tokens:
            size = shape.own_tokens
            own = _texts(tokenizer, texts, shape.requests + 1, size, chooser)[1:]
        longest = WORD_QUESTION.format(word="x" * 8)
        (system,) = cut(1, shape.prompt_tokens - shape.own_tokens, longest)
        return [
            [[_message("system", system), _message("user", f"{part}\n\n{question}".lstrip())]]
            for part, question in zip(own, _questions(system, shape.requests, chooser), strict=True)
        ]
    if shape.workload == "document":
        (document,) = cut(1, shape.prompt_tokens, WORD_QUESTION.format(word="x" * 8))
        return [
            [[_message("user", f"{document}\n\n{question}")]]
            for question in _questions(document, shape.requests, chooser)
        ]
    question = LONG_QUESTION if shape.workload == "long-answers" else QUESTION
    parts = cut(shape.requests * shape.turns, shape.prompt_tokens // shape.turns, question)
    turns = [[_message("user", f"{part}\n\n{question}")] for part in parts]
    return [turns[start : start + shape.turns] for start in range(0, len(turns), shape.turns)]


def write_dataset(path: Path, load: Sequence[Conversation]) -> None:
    """A file for `--dataset-name agentic-trace`."""
    turns = [[{"messages": turn} for turn in conversation] for conversation in load]
    path.write_text(json.dumps({"conversations": turns}))


def _texts(
    tokenizer: Any, texts: Mapping[str, str], count: int, size: int, chooser: random.Random
) -> list[str]:
    if size < 1:
        raise PassageError(
            f"a passage would have {size} tokens: accepts more --prompt-tokens or fewer --turns"
        )
    found = [ids for _, ids in passages(tokenizer, texts, size)]
    if len(found) < count:
        raise PassageError(
            f"the load needs {count} passages of {size} tokens: the texts hold {len(found)}; "
            "accepts fewer --requests, fewer --prompt-tokens or another --text-dir"
        )
    return [tokenizer.decode(ids) for ids in chooser.sample(found, count)]


def _overhead(tokenizer: Any, question: str) -> int:
    """Tokens of a prompt around its passage."""
    if not tokenizer.chat_template:
        return len(tokenizer.encode(f"\n\n{question}"))
    chat = tokenizer.apply_chat_template(
        [_message("user", f"\n\n{question}")], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer.encode(chat, add_special_tokens=False))


def _questions(text: str, count: int, chooser: random.Random) -> list[str]:
    """Different ones while the text has words left."""
    words = sorted(set(re.findall(r"[A-Za-z_]{6,12}", text))) or ["this"]
    chooser.shuffle(words)
    return [WORD_QUESTION.format(word=words[i % len(words)]) for i in range(count)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
