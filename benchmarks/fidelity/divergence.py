# SPDX-License-Identifier: Apache-2.0
"""How far a compressed prompt moves the model's next tokens: KL divergence, agreement, likelihood.

In process, on transformers, with the choices of `lava_sglang.policy`: what the server keeps. Or
through a running server, by the log-probabilities that it tells along a forced reply.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.fidelity import server as served
from benchmarks.fidelity.bootstrap import Estimate, geometric_ratio, mean
from benchmarks.fidelity.contexts import Context, Cutter, load_texts
from benchmarks.fidelity.options import (
    Contender,
    add_batch_argument,
    add_method_arguments,
    add_model_arguments,
    add_result_arguments,
    all_rows,
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
from benchmarks.fidelity.results import FULL, Record, Results
from benchmarks.fidelity.teacher_forcing import continuation_logits, greedy
from lava_sglang.tools.client import OFF, ServerClient
from lava_sglang.tools.inspection.prefill import prefill

KEY_FIELDS = ("context", "method", "budget")
GROUPS = ("all", "book", "longbench")

LEAST_NEW_TOKENS = 16
"""A model's own answer with fewer compared tokens is left out."""


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
        plot(results, arguments.plot, arguments.reference)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks, context after context, in process."""
    pairs = pairs_of(contenders_of(arguments), arguments.budgets)
    model, tokenizer = load_model_and_tokenizer(arguments)
    for context, missing in _missing(arguments, tokenizer, results, pairs):
        records = ContextRecords(context, arguments.new_tokens, results)
        compare_context(model, records, missing, arguments.batch_tokens)


def measure_server(arguments: argparse.Namespace, results: Results) -> None:
    """The same through `/generate` of a server, which tells of `--top-tokens` tokens at a time."""
    variants = server_variants_of(arguments)
    tokenizer = load_tokenizer(arguments)
    pairs = [(variant, budget) for variant in variants for budget in arguments.budgets]
    ends = end_tokens(GenerationConfig.from_pretrained(arguments.model_path))
    with ServerClient(arguments.server) as server:
        for context, missing in _missing(arguments, tokenizer, results, pairs):
            records = ContextRecords(context, arguments.new_tokens, results)
            choices = [(variant.label, budget) for variant, budget in missing]
            compare_on_server(server, records, choices, arguments.top_tokens, ends)


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


class ContextRecords:
    """The records of one context, and the CPU seconds of this process since the one before."""

    def __init__(self, context: Context, new_tokens: int, results: Results):
        """new_tokens: compared ones, at most."""
        self.context = context
        self.new_tokens = new_tokens
        self.results = results
        self.started = time.process_time()

    def continuation(self, answer: Callable[[int], list[int]]) -> list[int] | None:
        """The new tokens; None if they are too few. Adds the record of the full prompt if it is
        missing.

        The text's own, or those that an earlier run recorded, or those of `answer`, which takes
        how many.
        """
        full = self.results.get(self.context.name, FULL, None)
        if self.context.continuation is not None:
            tokens = self.context.continuation
        elif full is not None:
            tokens = list(full["continuation"])
        else:
            tokens = answer(self.new_tokens + 1)
        # The first new token comes from the exact prompt on a server too: it is fed, not compared.
        skipped = len(tokens) - 1 < min(LEAST_NEW_TOKENS, self.new_tokens)
        if full is None:
            size = len(self.context.prompt)
            self.add(FULL, None, size, skipped=skipped, continuation=tokens)
        return None if skipped else tokens

    def add(self, method: str, budget: float | None, kept: float, **values: Any) -> None:
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


def compare_context(
    model: Any,
    records: ContextRecords,
    pairs: Sequence[tuple[Contender, float]],
    batch_tokens: int,
) -> None:
    """Adds a record for each (contender, budget), and one for the full prompt if there is none.

    Each choice's next-token distributions are compared with those of the exact prefill.
    batch_tokens: new tokens in a forward pass, those of all rows together.
    """
    prompt = records.context.prompt
    window_size = max([1, *(contender.window_size for contender, _ in pairs)])
    exact = prefill(model, prompt, window_size)
    continuation = records.continuation(
        lambda count: greedy(model, exact, count, end_tokens(model.generation_config))
    )
    if continuation is None:
        return
    fed, targets = continuation[:-1], torch.tensor(continuation[1:], device=model.device)
    logits = continuation_logits(model, exact, fed, [None])[0]
    expected = logits.float().log_softmax(dim=1)
    for row in all_rows(model, exact, prompt, fed, pairs, batch_tokens):
        found = compare(expected, row.logits, targets)
        records.add(row.label, row.budget, row.kept_tokens, **found)


def compare_on_server(
    server: ServerClient,
    records: ContextRecords,
    choices: Iterable[tuple[str, float]],
    top_tokens: int,
    end_tokens: Sequence[int],
) -> None:
    """The same by what the server tells: of its exact prompt, then of each (method, budget).

    It tells of `top_tokens` tokens at each new one, the most likely ones of the exact prompt; the
    others count as one. end_tokens: end the model's own answer.
    """
    context = records.context

    def answer(count: int) -> list[int]:
        """The model's own, from the exact prompt, to before its first end token."""
        reply = served.ask(server, context.prompt, count, OFF).output_ids
        return list(takewhile(lambda token: token not in end_tokens, reply))

    continuation = records.continuation(answer)
    if continuation is None:
        return
    likely = served.likely_tokens(server, context.prompt, continuation, top_tokens)
    watched = [
        [target, *(token for token in tokens if token != target)][:top_tokens]
        for target, tokens in zip(continuation[1:], likely, strict=True)
    ]
    expected = served.force(server, context.prompt, continuation, watched, OFF)
    for method, budget in choices:
        settings = served.settings_of(method, budget)
        found = served.force(server, context.prompt, continuation, watched, settings)
        if not found.compressed and found.reason != "budget_covers_suffix":
            raise RuntimeError(f"{context.name}: the server did not compress it: {found.reason}")
        records.add(method, budget, found.kept_tokens, **served.compare(expected, found))


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


class Cell(NamedTuple):
    """One method at one budget over the contexts of a group."""

    kl: Estimate
    top1: Estimate
    nll_change: Estimate
    ratio: Estimate | None  # of KL to the reference method's, paired; None without it


def cells(
    records: Iterable[Record], reference: str, group: str = "all"
) -> dict[float, dict[str, Cell]]:
    """budget -> method -> cell, in the order of the records.

    A prompt that the budget covers says nothing of a method: its records are left out, but for
    those of budget 1, which show the noise.
    """
    found: dict[float, dict[str, dict[str, Record]]] = {}
    for record in records:
        covered = record["kept_tokens"] >= record["prompt_tokens"] and record["budget"] != 1
        if record["method"] != FULL and not covered and _belongs(record, group):
            by_method = found.setdefault(record["budget"], {})
            by_method.setdefault(record["method"], {})[record["context"]] = record
    return {
        budget: {
            method: _cell(by_context, by_method.get(reference, {}))
            for method, by_context in by_method.items()
        }
        for budget, by_method in sorted(found.items(), key=lambda item: (item[0] <= 1, item[0]))
    }


def _belongs(record: Record, group: str) -> bool:
    return group == "all" or (record["source"] == "book") == (group == "book")


def _cell(by_context: dict[str, Record], reference: dict[str, Record]) -> Cell:
    common = [context for context in by_context if context in reference]
    ratio = None
    if common:
        ratio = geometric_ratio(
            [by_context[context]["kl"] for context in common],
            [reference[context]["kl"] for context in common],
        )
    records = by_context.values()
    kl, top1, nll_change = (
        mean([record[field] for record in records]) for field in ("kl", "top1", "nll_change")
    )
    return Cell(kl, top1, nll_change, ratio)


def tables(records: Iterable[Record], reference: str) -> Iterator[Table]:
    """One table per statistic, methods by budgets; intervals on the second line of a cell."""
    by_budget = cells(list(records), reference)
    methods = dict.fromkeys(method for by_method in by_budget.values() for method in by_method)
    headings = {
        "kl": "KL(full || compressed), nats per token",
        "ratio": f"KL, geometric ratio to {reference}'s",
        "top1": "Share of tokens with the same argmax",
        "nll_change": "Change in NLL, nats per token",
    }
    for field, title in headings.items():
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("method")
        for budget, by_method in by_budget.items():
            contexts = max(cell.kl.n for cell in by_method.values())
            table.add_column(f"b={budget:g}\nn={contexts}", justify="right")
        for method in methods:
            row = [by_method.get(method) for by_method in by_budget.values()]
            table.add_row(method, *(_shown(cell and getattr(cell, field)) for cell in row))
        yield table


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f}\n{estimate.low:.2f}..{estimate.high:.2f}"


def as_json(records: Iterable[Record], reference: str) -> dict[str, Any]:
    """The cells of every group, and the CPU seconds of a context."""
    kept = list(records)
    contexts = {record["context"] for record in kept}
    seconds = sum(record["cpu_seconds"] for record in kept)
    return {
        "reference": reference,
        "contexts": len(contexts),
        "cpu_seconds_per_context": seconds / max(len(contexts), 1),
        "groups": {
            group: {
                f"{budget:g}": {method: _plain(cell) for method, cell in by_method.items()}
                for budget, by_method in cells(kept, reference, group).items()
            }
            for group in GROUPS
        },
    }


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        name: None if estimate is None else estimate._asdict()
        for name, estimate in cell._asdict().items()
    }


def plot(records: Iterable[Record], path: Path, reference: str) -> None:
    """KL by budget, and its ratio to the reference's, one line a method, 95 % intervals."""
    from matplotlib.figure import Figure

    from benchmarks.fidelity.plots import PANEL, budget_axis, line, save

    by_budget = cells(list(records), reference)
    tokens = [budget for budget in by_budget if budget > 1]
    methods = dict.fromkeys(method for budget in tokens for method in by_budget[budget])
    size = (2 * PANEL[0] + 2, PANEL[1])  # 2 for the legend, which covers no line
    figure = Figure(figsize=size, layout="constrained")
    kl, ratio = figure.subplots(1, 2)
    for number, method in enumerate(methods):
        at = [budget for budget in tokens if method in by_budget[budget]]
        line(kl, number, method, at, [by_budget[budget][method].kl for budget in at])
        ratios = [(budget, found) for budget in at if (found := by_budget[budget][method].ratio)]
        if method != reference:
            line(ratio, number, method, [b for b, _ in ratios], [found for _, found in ratios])
    ratio.axhline(1, color="black", linewidth=0.8)
    kl.set_title("KL(full || compressed), nats per token")
    ratio.set_title(f"KL, ratio to {reference}")
    for axes in (kl, ratio):
        axes.set_yscale("log")
        budget_axis(axes, tokens)
    figure.legend(*kl.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    save(figure, path)


if __name__ == "__main__":
    main()
