# SPDX-License-Identifier: Apache-2.0
"""How far a compressed prompt moves the model's next tokens: KL divergence, agreement, likelihood.

In process, on transformers, with the choices of `lava_sglang.policy`: what the server keeps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from contexts import Context, Cutter
from continuation import continuation_logits, continuations, greedy, mean_kept
from divergence_summary import FULL, as_json, tables
from options import (
    add_method_arguments,
    add_model_arguments,
    add_result_arguments,
    contenders_of,
    integers,
    load_model_and_tokenizer,
    open_results,
    write_summary,
)
from peers import recorded
from results import Record, Results
from rich.console import Console
from rich.progress import track
from texts import load_texts
from torch import Tensor
from variants import Contender, Wanted

from lava_sglang.inspection.prefill import Prefill, prefill

LEAST_NEW_TOKENS = 16
"""A model's own answer with fewer compared tokens is left out."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_result_arguments(parser)
    parser.add_argument("--contexts", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--lengths", type=integers, default="1024,2048,4096", help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="compared after each prompt")
    parser.add_argument("--reference", default="lava", help="method that ratios are to")
    arguments = parser.parse_args(argv)
    results = open_results(arguments, ("context", "method", "budget"), "divergence", "new_tokens")
    measure(arguments, results)
    console = Console()
    for table in tables(results, arguments.reference):
        console.print(table)
    write_summary(arguments, as_json(results, arguments.reference))
    if arguments.plot is not None:
        from plots import plot_divergence

        plot_divergence(results, arguments.plot, arguments.reference)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks, context after context."""
    contenders = contenders_of(arguments)
    model, tokenizer = load_model_and_tokenizer(arguments)
    cutter = Cutter(tokenizer, load_texts(arguments.data), arguments.seed)
    contexts = cutter.contexts(arguments.contexts, arguments.lengths, arguments.new_tokens + 1)
    for context in track(contexts, "Contexts", console=Console(stderr=True)):
        missing = [
            (contender, budget)
            for contender in contenders
            for budget in arguments.budgets
            if results.get(context.name, contender.label, budget) is None
        ]
        full = results.get(context.name, FULL, None)
        if missing and not (full and full["skipped"]):
            Comparison(model, context, arguments.new_tokens, results).run(
                missing, arguments.batch_tokens
            )


class Comparison:
    """One context: its exact prefill and next-token distributions, then those of each choice."""

    def __init__(self, model: Any, context: Context, new_tokens: int, results: Results):
        self.model = model
        self.context = context
        self.results = results
        self.new_tokens = new_tokens
        self.started = time.process_time()

    def run(self, pairs: Sequence[tuple[Contender, float]], batch_tokens: int) -> None:
        """Adds a record for each (contender, budget), and one for the full prompt if there is none.

        batch_tokens: new tokens in a forward pass, those of all rows together.
        """
        contenders = [contender for contender, _ in pairs]
        window_size = max(contender.window_size for contender in contenders)
        with recorded(self.model, contenders) as inputs:
            exact = prefill(self.model, self.context.prompt, window_size)
        # The first new token comes from the exact prompt on a server too: it is fed, not compared.
        continuation = self._continuation(exact)
        fed, targets = continuation[:-1], torch.tensor(continuation[1:], device=self.model.device)
        skipped = len(fed) < min(LEAST_NEW_TOKENS, self.new_tokens)
        if self.results.get(self.context.name, FULL, None) is None:
            self._add(FULL, None, exact.prompt_len, skipped=skipped, continuation=continuation)
        if skipped:
            return
        logits = continuation_logits(self.model, exact, fed, [None])[0]
        expected = logits.float().log_softmax(dim=1)
        wanted = Wanted(pairs, exact.prompt_len)
        choices = wanted.choices(exact, inputs)
        for (label, size), row in continuations(self.model, exact, fed, choices, batch_tokens):
            found = compare(expected, row, targets)
            kept = mean_kept(choices[label, size], exact.prompt_len)
            for budget in wanted.budgets(label, size):
                self._add(label, budget, kept, **found)

    def _continuation(self, exact: Prefill) -> list[int]:
        """The text's own next tokens, or the model's, which an earlier run may have recorded."""
        if self.context.continuation is not None:
            return self.context.continuation
        full = self.results.get(self.context.name, FULL, None)
        if full is not None:
            return list(full["continuation"])
        ends = self.model.generation_config.eos_token_id
        end_tokens = ends if isinstance(ends, list) else [ends]
        return greedy(self.model, exact, self.new_tokens + 1, end_tokens)

    def _add(self, method: str, budget: float | None, kept: float, **values: Any) -> None:
        now = time.process_time()
        record = {
            "context": self.context.name,
            "source": self.context.source,
            "prompt_tokens": len(self.context.prompt),
            "method": method,
            "budget": budget,
            "kept_tokens": kept,
            **values,
            "cpu_seconds": round(now - self.started, 4),
        }
        self.started = now
        self.results.add(record)


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
