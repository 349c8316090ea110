# SPDX-License-Identifier: Apache-2.0
"""What a compressed conversation still knows when the question comes in a later turn.

A fact stands in a document, or in one of several messages. It is asked for inside the compressed
prompt, after the compression in the same request (in process: a server cannot be asked so), and as
a next turn, with the radix tree kept and evicted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fidelity.bootstrap import Estimate, mean
from benchmarks.fidelity.contexts import PLACE, Cutter, load_texts
from benchmarks.fidelity.haystack import DEPTH_BINS, KINDS, lead, needle, sentence_end
from benchmarks.fidelity.methods import Variant, rows
from benchmarks.fidelity.needle import score_answer
from benchmarks.fidelity.options import (
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
from benchmarks.fidelity.results import FULL, Record, Results
from benchmarks.fidelity.server import ask, settings_of
from lava_sglang.config import Scope
from lava_sglang.tools.client import ServerClient
from lava_sglang.tools.inspection.prefill import prefill
from lava_sglang.tools.server_process import Server, machine_options

REPLY_TOKENS = 24
KEY_FIELDS = ("conversation", "scope", "turn", "method", "budget")

INSIDE, AFTER = "inside the prompt", "after compression"
KEPT, EVICTED = "next turn, tree kept", "next turn, tree evicted"
PLACES_OF_THE_QUESTION = (INSIDE, AFTER, KEPT, EVICTED)

Place = tuple[str, str, str | None]  # form, turn, scope
Choice = tuple[str, float | None]  # method, budget

DOCUMENT, CHAT = "document", "chat"
TURNS = {DOCUMENT: 1, CHAT: 4}
"""User messages with text, before the one with the question."""

REQUESTS = {
    DOCUMENT: "Summarize this text in one sentence.",
    CHAT: "What do you think of this? Answer in one sentence.",
}
_REPLY = "{reply}"


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
        self.settings = settings_of(method, budget)

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
            reply = ask(self.server, history, REPLY_TOKENS, self.settings).output_ids
            history = history + [token for token in reply if token != self.end_token]
        return history

    def _ask(self, turn: str, prompt: list[int]) -> Record:
        count = len(self.conversation.answer_ids) + 2
        reply = ask(self.server, prompt, count, self.settings)
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
    window_size = max(variant.window_size for variant, _ in missing)
    exact = prefill(model, told["history"], window_size)
    fed = conversation.pieces[-1] + conversation.answer_ids[:-1]
    for row in rows(model, exact, fed, missing, len(fed)):
        values = score_answer(row.logits, conversation.answer_ids)
        results.add(
            {
                "conversation": conversation.name,
                "form": conversation.form,
                "scope": None,
                "turn": AFTER,
                "method": row.label,
                "budget": row.budget,
                "prompt_tokens": exact.prompt_len,
                "cached_tokens": 0,
                "compressed": row.kept_tokens < exact.prompt_len,
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


class Conversation(NamedTuple):
    """What stands between the model's replies, as token ids in the model's chat format."""

    name: str  # unique, the same for the same seed
    form: str  # DOCUMENT or CHAT
    pieces: list[list[int]]  # the last one holds the question and the beginning of its answer
    single: list[int]  # the text and the question as one message: a prompt of its own
    answer: str
    answer_ids: list[int]


def conversations(
    cutter: Cutter, forms: Sequence[str], kinds: Sequence[str], lengths: Sequence[int], count: int
) -> Iterator[Conversation]:
    """`count` of every form; kinds of answers (haystack.KINDS) and lengths in turn.

    lengths: tokens of the text with its fact and question, without the model's replies.
    """
    for number in range(count):
        for form in forms:
            kind = kinds[number % len(kinds)]
            length = lengths[number // len(kinds) % len(lengths)]
            yield _conversation(cutter, form, kind, length, number)


def _conversation(cutter: Cutter, form: str, kind: str, length: int, number: int) -> Conversation:
    source = needle(cutter, kind, length, number % DEPTH_BINS, number, distractors=0)
    before, _ = cutter.around(PLACE)
    text = source.tokens[len(before) : source.question_start]
    turns = TURNS[form]
    # Between sentences: a fact is in one turn.
    cuts = [sentence_end(cutter, text, len(text) * turn // turns) for turn in range(1, turns)]
    parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    around = _around(cutter, form, source.key)
    pieces = [around[2 * i] + part + around[2 * i + 1] for i, part in enumerate(parts)]
    pieces.append(around[-1] + cutter.encode(lead(source.key)))
    return Conversation(
        name=f"{form}/{source.name}",
        form=form,
        pieces=pieces,
        single=source.tokens[: source.answer_start],
        answer=source.answer,
        answer_ids=source.tokens[source.answer_start :],
    )


def _around(cutter: Cutter, form: str, key: str) -> list[list[int]]:
    """Token ids before the first text, after it, before the next, ..., after the last reply."""
    messages = []
    for _ in range(TURNS[form]):
        messages.append({"role": "user", "content": f"{PLACE}\n\n{REQUESTS[form]}"})
        messages.append({"role": "assistant", "content": _REPLY})
    messages.append({"role": "user", "content": f"What is the secret code of {key}?"})
    chat = cutter.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return [cutter.encode(part) for part in chat.replace(_REPLY, PLACE).split(PLACE)]


def cells(records: Iterable[Record]) -> dict[Place, dict[Choice, Estimate]]:
    """Exact match over all conversations, those that the exact cache fails included."""
    found: dict[Place, dict[Choice, list[float]]] = {}
    for record in records:
        place = record["form"], record["turn"], record["scope"]
        by_choice = found.setdefault(place, {})
        choice = record["method"], record["budget"]
        by_choice.setdefault(choice, []).append(record["exact_match"])
    return {
        place: {choice: mean(values) for choice, values in by_choice.items()}
        for place, by_choice in sorted(found.items(), key=lambda item: _order(item[0]))
    }


def _order(place: Place) -> tuple[str, int, str]:
    form, turn, scope = place
    return form, PLACES_OF_THE_QUESTION.index(turn), scope or ""


def table(records: Iterable[Record]) -> Table:
    """One row for each place of the question, one column for each choice."""
    by_place = cells(list(records))
    choices = dict.fromkeys(choice for by_choice in by_place.values() for choice in by_choice)
    shown = Table(title="Exact match", box=SIMPLE_HEAD)
    for heading in ("", "question", "scope", "n"):
        shown.add_column(heading)
    for method, budget in choices:
        shown.add_column("exact" if method == FULL else f"{method}\nb={budget:g}", justify="right")
    for (form, turn, scope), by_choice in by_place.items():
        count = max(estimate.n for estimate in by_choice.values())
        values = [by_choice.get(choice) for choice in choices]
        row = ["" if value is None else f"{value.value:.2f}" for value in values]
        shown.add_row(form, turn, scope or "", str(count), *row)
    return shown


def as_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [
        {
            "form": form,
            "turn": turn,
            "scope": scope,
            "method": method,
            "budget": budget,
            "exact_match": estimate._asdict(),
        }
        for (form, turn, scope), by_choice in cells(records).items()
        for (method, budget), estimate in by_choice.items()
    ]


if __name__ == "__main__":
    main()
