# SPDX-License-Identifier: Apache-2.0
"""What each scope compresses of traffic that shares prompts: chats, documents, repeats, samples.

For each scope a server answers the same requests, one after the other. Token counts, no timings: a
busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lava_sglang.tools.client import Answer, ServerClient
from lava_sglang.tools.machine import machine_line
from lava_sglang.tools.passages import passages, python_topics
from lava_sglang.tools.server_process import Server, machine_options

SCOPES = ("suffix", "auto", "prompt")
ANSWER_TOKENS = 24


@dataclass
class Outcome:
    """Sums over the requests of one kind of traffic."""

    requests: int = 0
    compressed: int = 0
    prompt_tokens: int = 0
    held_slots: int = 0  # of the prompts, while their answers grow
    prefilled_tokens: int = 0  # not taken from the tree
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        meta = answer["meta_info"]
        info = meta["kv_compression"]
        self.requests += 1
        self.compressed += info["status"] == "compressed"
        self.prompt_tokens += meta["prompt_tokens"]
        self.held_slots += meta["prompt_tokens"] - info["slots_freed"]
        self.prefilled_tokens += meta["prompt_tokens"] - meta["cached_tokens"]
        if "reason" in info:
            self.reasons[info["reason"]] += 1


class Traffic:
    """Requests of token ids, made of passages; no two kinds share a token sequence."""

    def __init__(self, tokenizer: Any, client: ServerClient) -> None:
        self.tokenizer = tokenizer
        self.client = client
        self._passages = passages(tokenizer, python_topics(), 700)

    def text(self, count: int) -> list[int]:
        return next(self._passages)[1][:count]

    def ask(self, prompt: list[int], outcome: Outcome, **sampling: Any) -> list[int]:
        """Returns the answer's tokens."""
        answer: Any = self.client.generate(prompt, ANSWER_TOKENS, sampling=sampling)
        for one in answer if isinstance(answer, list) else [answer]:
            outcome.add(one)
        return list((answer[0] if isinstance(answer, list) else answer)["output_ids"])

    def run(self) -> Iterator[tuple[str, Outcome]]:
        for kind in (self.chats, self.documents, self.repeats, self.regenerated, self.samples):
            self.client.flush_cache()
            outcome = Outcome()
            kind(outcome)
            yield kind.__name__, outcome

    def chats(self, outcome: Outcome) -> None:
        """4 chats under one system prompt, in turn; 4 turns each, of 200 tokens."""
        system = self.text(300)
        chats = [system + self.text(200) for _ in range(4)]
        for turn in range(4):
            for i, chat in enumerate(chats):
                chats[i] = chat + self.ask(chat, outcome)
                if turn < 3:
                    chats[i] += self.text(200)

    def documents(self, outcome: Outcome) -> None:
        """3 documents of 700 tokens, 5 questions of 120 tokens about each."""
        for document in [self.text(700) for _ in range(3)]:
            for _ in range(5):
                self.ask(document + self.text(120), outcome)

    def repeats(self, outcome: Outcome) -> None:
        """3 prompts of 700 tokens, each sent 3 times."""
        for prompt in [self.text(700) for _ in range(3)]:
            for _ in range(3):
                self.ask(prompt, outcome)

    def regenerated(self, outcome: Outcome) -> None:
        """2 chats of 3 turns, the last turn asked for 3 times."""
        for _ in range(2):
            chat = self.text(400)
            for _ in range(2):
                chat += self.ask(chat, outcome) + self.text(200)
            for _ in range(3):
                self.ask(chat, outcome)

    def samples(self, outcome: Outcome) -> None:
        """2 prompts of 700 tokens with n = 3."""
        for _ in range(2):
            self.ask(self.text(700), outcome, n=3)


def measure(model_path: str, scope: str, budget: str) -> dict[str, Outcome]:
    from transformers import AutoTokenizer

    options = ["--model-path", model_path, *machine_options(), "--max-total-tokens", "24576"]
    options += ["--kv-compression", "lava_span", "--kv-compression-budget", budget]
    options += ["--kv-compression-min-tokens", "100"]
    options += ["--kv-compression-config", json.dumps({"scope": scope})]
    with Server(options) as server, ServerClient(server.url) as client:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        return dict(Traffic(tokenizer, client).run())


def table(found: dict[str, dict[str, Outcome]]) -> Table:
    """found: outcomes by scope and kind of traffic."""
    shown = Table("traffic", "scope", "compressed", "slots held", "prefilled", "not compressed")
    for kind in next(iter(found.values())):
        for scope, outcomes in found.items():
            one = outcomes[kind]
            shown.add_row(
                kind,
                scope,
                f"{one.compressed} of {one.requests}",
                f"{one.held_slots:,} of {one.prompt_tokens:,}",
                f"{one.prefilled_tokens:,}",
                ", ".join(f"{count} {reason}" for reason, count in one.reasons.items()),
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scopes", description=__doc__)
    parser.add_argument("--model-path", required=True, help="folder or Hugging Face model id")
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--budget", default="0.25", help="of the server (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    arguments = parser.parse_args()
    found = {
        scope: measure(arguments.model_path, scope, arguments.budget) for scope in arguments.scopes
    }
    console = Console(width=110)
    console.print(table(found))
    console.print(machine_line())
    if arguments.json is not None:
        numbers = {
            scope: {kind: vars(one) for kind, one in outcomes.items()}
            for scope, outcomes in found.items()
        }
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
