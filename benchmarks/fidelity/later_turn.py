# SPDX-License-Identifier: Apache-2.0
"""What a compressed conversation still knows when the question comes in a later turn.

A fact stands in a document, or in one of several messages. It is asked for inside the compressed
prompt, after the compression in the same request (in process: a server cannot be asked so), and as
a next turn, with the radix tree kept and evicted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from client import ServerClient
from contexts import Cutter
from continuation import continuation_logits
from conversation import TURNS, Conversation, conversations
from haystack import KINDS
from later_turn_summary import AFTER, EVICTED, INSIDE, KEPT, as_json, table
from needle_summary import FULL
from options import (
    add_method_arguments,
    add_model_arguments,
    add_result_arguments,
    integers,
    load_model_and_tokenizer,
    open_results,
    pairs_of,
    variants_of,
    write_summary,
)
from results import Record, Results
from rich.console import Console
from rich.progress import track
from texts import load_texts
from trial import score_answer
from variants import Variant, choose

from lava_sglang.config import Scope
from lava_sglang.tools.inspection.prefill import prefill
from lava_sglang.tools.server_process import Server, machine_options

REPLY_TOKENS = 24
KEY_FIELDS = ("conversation", "scope", "turn", "method", "budget")

Choice = tuple[str, float | None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_method_arguments(parser, methods=["lava_span"], budgets="128,0.25")
    add_result_arguments(parser, plot=False)
    parser.add_argument("--url", help="a running server; default: starts its own, one per scope")
    parser.add_argument(
        "--scopes", nargs="+", choices=get_args(Scope), default=["suffix", "prompt"]
    )
    parser.add_argument("--min-tokens", type=int, default=128, help="of servers it starts")
    parser.add_argument("--conversations", type=int, default=20, help="of every form")
    parser.add_argument("--forms", nargs="+", choices=list(TURNS), default=list(TURNS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["digits3", "digits5"])
    parser.add_argument("--lengths", type=integers, default="2048", help="tokens of text")
    parser.add_argument("server_args", nargs="*", help="after --: options of servers it starts")
    arguments = parser.parse_args(argv)
    results = open_results(arguments, KEY_FIELDS, "later_turn", "min_tokens")
    measure(arguments, results)
    Console().print(table(results))
    write_summary(arguments, as_json(results), arguments.url)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks: first through servers, then in process."""
    pairs = pairs_of(variants_of(arguments), arguments.budgets)
    model, tokenizer = load_model_and_tokenizer(arguments)
    cutter = Cutter(tokenizer, load_texts(arguments.data), arguments.seed)
    count, lengths = arguments.conversations, arguments.lengths
    found = list(conversations(cutter, arguments.forms, arguments.kinds, lengths, count))
    choices: list[Choice] = [(FULL, None)]
    choices += [(variant.label, budget) for variant, budget in pairs]
    for scope, server in _servers(arguments):
        for conversation in track(found, f"Scope {scope}", console=Console(stderr=True)):
            for method, budget in choices:
                if results.get(conversation.name, scope, EVICTED, method, budget) is None:
                    dialogue = Dialogue(server, conversation, tokenizer, method, budget)
                    for record in dialogue.records():
                        results.add({**record, "scope": scope})
    for conversation in track(found, "In process", console=Console(stderr=True)):
        _ask_after(pairs, model, conversation, results)


class Dialogue:
    """One conversation with a server, under one choice of method and budget."""

    def __init__(
        self,
        server: ServerClient,
        conversation: Conversation,
        tokenizer: Any,
        method: str,
        budget: float | None,
    ):
        self.server = server
        self.conversation = conversation
        self.end_token = tokenizer.eos_token_id
        self.method = method
        self.budget = budget
        self.settings = {"enabled": False}
        if budget is not None:
            self.settings = {"method": method, "budget": budget}

    def records(self) -> list[Record]:
        """The question inside the prompt, then as a next turn with the tree kept, then evicted."""
        self.server.flush_cache()
        inside = self._ask(INSIDE, self.conversation.single)
        self.server.flush_cache()
        history = self._history()
        prompt = history + self.conversation.pieces[-1]
        kept = self._ask(KEPT, prompt)
        self.server.flush_cache()
        evicted = self._ask(EVICTED, prompt)
        if self.method == FULL:
            evicted["history"] = history  # for `ask_after`
        return [inside, kept, evicted]

    def _history(self) -> list[int]:
        """Every turn but the last is sent and answered, as a chat client does."""
        history: list[int] = []
        for piece in self.conversation.pieces[:-1]:
            history = history + piece
            reply = self.server.generate(history, REPLY_TOKENS, self.settings).output_ids
            history = history + [token for token in reply if token != self.end_token]
        return history

    def _ask(self, turn: str, prompt: list[int]) -> Record:
        count = len(self.conversation.answer_ids) + 2
        reply = self.server.generate(prompt, count, self.settings)
        return {
            "conversation": self.conversation.name,
            "form": self.conversation.form,
            "turn": turn,
            "method": self.method,
            "budget": self.budget,
            "prompt_tokens": len(prompt),
            "cached_tokens": reply.cached_tokens,
            "compressed": reply.compressed,
            "reason": reply.reason,
            "exact_match": float(reply.text.strip().startswith(self.conversation.answer)),
        }


def _ask_after(
    pairs: Sequence[tuple[Variant, float]],
    model: Any,
    conversation: Conversation,
    results: Results,
) -> None:
    """The whole history is compressed, then the question comes: by teacher forcing."""
    # The exact cache replies the same in every scope.
    told = next(
        (r for r in results if r["conversation"] == conversation.name and "history" in r), None
    )
    missing = [
        (variant, budget)
        for variant, budget in pairs
        if results.get(conversation.name, None, AFTER, variant.label, budget) is None
    ]
    if told is None or not missing:
        return
    window_size = max(variant.method.config.window_size for variant, _ in missing)
    exact = prefill(model, told["history"], window_size)
    fed = conversation.pieces[-1] + conversation.answer_ids[:-1]
    for variant, budget in missing:
        size = variant.kept_tokens(budget, exact.prompt_len)
        logits = continuation_logits(model, exact, fed, choose(variant, exact, [size]))[0]
        values = score_answer(logits, conversation.answer_ids)
        results.add(
            {
                "conversation": conversation.name,
                "form": conversation.form,
                "scope": None,
                "turn": AFTER,
                "method": variant.label,
                "budget": budget,
                "prompt_tokens": exact.prompt_len,
                "cached_tokens": 0,
                "compressed": size < exact.prompt_len,
                "reason": "",
                "exact_match": values["exact_match"],
            }
        )


def _servers(arguments: argparse.Namespace) -> Iterator[tuple[str, ServerClient]]:
    """Each scope with a server that has it; `--url` is asked for its own."""
    if arguments.url is not None:
        with ServerClient(arguments.url) as client:
            yield client.scope(), client
        return
    for scope in arguments.scopes:
        with _started(arguments, scope) as client:
            yield scope, client


@contextmanager
def _started(arguments: argparse.Namespace, scope: str) -> Iterator[ServerClient]:
    options = {
        "--model-path": arguments.model_path,
        "--kv-compression": "lava",
        "--kv-compression-min-tokens": arguments.min_tokens,
        "--kv-compression-config": json.dumps({**arguments.config, "scope": scope}),
    }
    words = [str(word) for pair in options.items() for word in pair]
    with (
        Server([*words, *machine_options(), *arguments.server_args]) as server,
        ServerClient(server.url) as client,
    ):
        yield client


if __name__ == "__main__":
    main()
