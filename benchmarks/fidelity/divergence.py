# SPDX-License-Identifier: Apache-2.0
"""How far a compressed prompt moves the model's next tokens: KL divergence, agreement, likelihood.

In process, on transformers, with the choices of `lava_sglang.policy`: what the server keeps. Or
through a running server, by the log-probabilities that it tells along a forced reply.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from client import ServerClient
from context_records import ContextRecords
from contexts import Context, Cutter
from continuation import continuation_logits, continuations, greedy, mean_kept
from divergence_summary import FULL, as_json, tables
from options import (
    add_batch_argument,
    add_method_arguments,
    add_model_arguments,
    add_result_arguments,
    contenders_of,
    integers,
    load_model_and_tokenizer,
    load_tokenizer,
    open_results,
    pairs_of,
    positive,
    read_server_settings,
    server_variants_of,
    write_summary,
)
from peers import recorded
from results import Record, Results
from rich.console import Console
from rich.progress import track
from server_comparison import ServerComparison
from texts import load_texts
from torch import Tensor
from transformers import GenerationConfig
from variants import Contender, Wanted

from lava_sglang.tools.inspection.prefill import prefill

KEY_FIELDS = ("context", "method", "budget")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_batch_argument(parser)
    add_result_arguments(parser)
    parser.add_argument("--contexts", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--lengths", type=integers, default="1024,2048,4096", help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="compared after each prompt")
    parser.add_argument("--reference", default="lava", help="method that ratios are to")
    parser.add_argument("--server", metavar="URL", help="measure a running server of lava-sglang")
    parser.add_argument(
        "--top-tokens", type=positive, default=100, help="that a server tells of (default 100)"
    )
    arguments = parser.parse_args(argv)
    if arguments.server is None:
        results = open_results(arguments, KEY_FIELDS, "divergence", "new_tokens")
        measure(arguments, results)
    else:
        read_server_settings(arguments)
        fields = ("new_tokens", "top_tokens", "server_settings")
        results = open_results(arguments, KEY_FIELDS, "divergence on a server", *fields)
        measure_server(arguments, results)
    console = Console()
    for table in tables(results, arguments.reference):
        console.print(table)
    write_summary(arguments, as_json(results, arguments.reference), arguments.server)
    if arguments.plot is not None:
        from plots import plot_divergence

        plot_divergence(results, arguments.plot, arguments.reference)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks, context after context, in process."""
    pairs = pairs_of(contenders_of(arguments), arguments.budgets)
    model, tokenizer = load_model_and_tokenizer(arguments)
    for context, missing in _missing(arguments, tokenizer, results, pairs):
        records = ContextRecords(context, arguments.new_tokens, results)
        Comparison(model, records).run(missing, arguments.batch_tokens)


def measure_server(arguments: argparse.Namespace, results: Results) -> None:
    """The same through `/generate` of a server, which tells of `--top-tokens` tokens at a time."""
    variants = server_variants_of(arguments)
    tokenizer = load_tokenizer(arguments)
    pairs = [(variant, budget) for variant in variants for budget in arguments.budgets]
    ends = end_tokens(GenerationConfig.from_pretrained(arguments.model_path))
    with ServerClient(arguments.server) as server:
        for context, missing in _missing(arguments, tokenizer, results, pairs):
            records = ContextRecords(context, arguments.new_tokens, results)
            comparison = ServerComparison(server, records, arguments.top_tokens, ends)
            comparison.run([(variant.label, budget) for variant, budget in missing])


def _missing(
    arguments: argparse.Namespace,
    tokenizer: Any,
    results: Results,
    pairs: Sequence[tuple[Contender, float]],
) -> Iterator[tuple[Context, list[tuple[Contender, float]]]]:
    """Contexts with what `results` lacks of them; those whose answer is too short are left out."""
    cutter = Cutter(tokenizer, load_texts(arguments.data), arguments.seed)
    contexts = cutter.contexts(arguments.contexts, arguments.lengths, arguments.new_tokens + 1)
    for context in track(contexts, "Contexts", console=Console(stderr=True)):
        missing = [
            (contender, budget)
            for contender, budget in pairs
            if results.get(context.name, contender.label, budget) is None
        ]
        full = results.get(context.name, FULL, None)
        if missing and not (full and full["skipped"]):
            yield context, missing


class Comparison:
    """One context: its exact prefill and next-token distributions, then those of each choice."""

    def __init__(self, model: Any, records: ContextRecords):
        self.model = model
        self.records = records

    def run(self, pairs: Sequence[tuple[Contender, float]], batch_tokens: int) -> None:
        """Adds a record for each (contender, budget), and one for the full prompt if there is none.

        batch_tokens: new tokens in a forward pass, those of all rows together.
        """
        contenders = [contender for contender, _ in pairs]
        window_size = max(contender.window_size for contender in contenders)
        with recorded(self.model, contenders) as inputs:
            exact = prefill(self.model, self.records.context.prompt, window_size)
        continuation = self.records.continuation(
            lambda count: greedy(self.model, exact, count, end_tokens(self.model.generation_config))
        )
        if continuation is None:
            return
        fed, targets = continuation[:-1], torch.tensor(continuation[1:], device=self.model.device)
        logits = continuation_logits(self.model, exact, fed, [None])[0]
        expected = logits.float().log_softmax(dim=1)
        wanted = Wanted(pairs, exact.prompt_len)
        choices = wanted.choices(exact, inputs)
        for (label, size), row in continuations(self.model, exact, fed, choices, batch_tokens):
            found = compare(expected, row, targets)
            kept = mean_kept(choices[label, size], exact.prompt_len)
            for budget in wanted.budgets(label, size):
                self.records.add(label, budget, kept, **found)


def end_tokens(config: Any) -> list[int]:
    """Of a model's GenerationConfig; none, one or more."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def compare(expected: Tensor, logits: Tensor, targets: Tensor) -> Record:
    """Distances between next-token distributions, means over T tokens.

    expected: log-probabilities [T, vocabulary] of the full prompt. logits: [T, vocabulary] of the
    compressed one. targets: int64 [T], the tokens that came. Returns kl, KL(full || compressed) in
    nats; top1, the share of tokens with the same argmax; nll_change, in nats per token.
    """
    found = logits.float().log_softmax(dim=1)
    kl = (expected.exp() * (expected - found)).sum(dim=1)
    change = (expected - found).gather(1, targets[:, None])
    return {
        "kl": float(kl.mean()),
        "top1": float((expected.argmax(dim=1) == found.argmax(dim=1)).float().mean()),
        "nll_change": float(change.mean()),
    }


if __name__ == "__main__":
    main()
