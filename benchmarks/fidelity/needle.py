# SPDX-License-Identifier: Apache-2.0
"""Whether a compressed prompt still answers a question about one made-up fact in real text.

In process by teacher forcing, with the question inside the compressed prompt and after it; or on a
running server by the text that it generates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.fidelity.bootstrap import Estimate, mean
from benchmarks.fidelity.contexts import Cutter, load_texts
from benchmarks.fidelity.haystack import DEPTH_BINS, KINDS, Needle, needles
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
    server_variants_of,
    write_summary,
)
from benchmarks.fidelity.results import FULL, Record, Results
from benchmarks.fidelity.server import ask, settings_of
from benchmarks.fidelity.teacher_forcing import continuation_logits
from lava_sglang.tools.client import ServerClient
from lava_sglang.tools.inspection.prefill import Prefill, prefill

KEY_FIELDS = ("needle", "question", "method", "budget")

INSIDE, AFTER = "inside", "after"
"""Where the question stands: in the compressed prompt's window, or after the compression."""

Pairs = Sequence[tuple[Contender, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_batch_argument(parser)
    add_result_arguments(parser)
    parser.add_argument("--server", metavar="URL", help="measure a running server of lava-sglang")
    parser.add_argument("--needles", type=int, default=30, help="of every kind (default 30)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", type=integers, default="1024,2048,4096", help="tokens")
    parser.add_argument("--distractors", type=int, default=0, help="facts about other names")
    parser.add_argument("--questions", nargs="+", choices=(INSIDE, AFTER), default=[INSIDE, AFTER])
    parser.add_argument("--plot-depths", type=Path, help="draw depth by length to this file")
    arguments = parser.parse_args(argv)
    through = "needle" if arguments.server is None else "needle on a server"
    results = open_results(arguments, KEY_FIELDS, through)
    run = measure if arguments.server is None else measure_server
    run(arguments, results)
    console = Console()
    for table in tables(results):
        console.print(table)
    write_summary(arguments, as_json(results), arguments.server)
    if arguments.plot is not None:
        plot_needles(results, arguments.plot)
    if arguments.plot_depths is not None:
        plot_depths(results, arguments.plot_depths)


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks, needle after needle, in process."""
    pairs = pairs_of(contenders_of(arguments), arguments.budgets)
    model, tokenizer = load_model_and_tokenizer(arguments)
    for needle in _progress(arguments, tokenizer):
        missing = {
            question: _missing(results, needle, question, pairs) for question in arguments.questions
        }
        if any(missing.values()):
            try_needle(model, needle, results, missing, arguments.batch_tokens)


def measure_server(arguments: argparse.Namespace, results: Results) -> None:
    """The same through `/generate`: the exact prompts, the answers as generated text.

    The question is inside the prompt; nothing can come after it within one request.
    """
    variants = server_variants_of(arguments)
    pairs = [(variant.label, b) for variant in variants for b in arguments.budgets]
    tokenizer = load_tokenizer(arguments)
    with ServerClient(arguments.server) as server:
        for needle in _progress(arguments, tokenizer):
            for method, budget in [(FULL, None), *pairs]:
                if results.get(needle.name, INSIDE, method, budget) is None:
                    results.add(_ask_server(server, needle, method, budget))


def _ask_server(server: ServerClient, needle: Needle, method: str, budget: float | None) -> Record:
    # Else the prompt is found in the radix tree, and there is nothing of its own to compress.
    server.flush_cache()
    prompt = needle.tokens[: needle.answer_start]
    reply = ask(server, prompt, needle.answer_tokens + 2, settings_of(method, budget))
    if budget is not None and not reply.compressed:
        raise RuntimeError(f"{needle.name}: the server did not compress it: {reply.reason}")
    values = {"exact_match": float(reply.text.strip().startswith(needle.answer)), "nll": None}
    return needle_record(needle, INSIDE, method, budget, reply.kept_tokens, values)


def _progress(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    cutter = Cutter(tokenizer, load_texts(arguments.data), arguments.seed)
    kinds, lengths, count = arguments.kinds, arguments.lengths, arguments.needles
    found = list(needles(cutter, kinds, lengths, count, arguments.distractors))
    return track(found, "Needles", console=Console(stderr=True))


def _missing(
    results: Results,
    needle: Needle,
    question: str,
    pairs: Sequence[tuple[Contender, float]],
) -> list[tuple[Contender, float]]:
    return [
        (contender, budget)
        for contender, budget in pairs
        if results.get(needle.name, question, contender.label, budget) is None
    ]


def try_needle(
    model: Any, needle: Needle, results: Results, missing: Mapping[str, Pairs], batch_tokens: int
) -> None:
    """Adds a record for each (contender, budget) of each question, and of the full prompt.

    The question stands inside what is compressed, or is fed after it as the same tokens.
    """
    windows = [contender.window_size for pairs in missing.values() for contender, _ in pairs]
    asked = needle.answer_start - needle.question_start
    # The queries of both windows: of the text's last tokens, and of the question's.
    exact = prefill(model, needle.tokens[: needle.answer_start], asked + max([1, *windows]))
    history = exact.without_last(asked)
    for question, found in ((INSIDE, exact), (AFTER, history)):
        if missing.get(question):
            _ask(model, needle, results, question, found, missing[question], batch_tokens)


def _ask(
    model: Any,
    needle: Needle,
    results: Results,
    question: str,
    exact: Prefill,
    pairs: Pairs,
    batch_tokens: int,
) -> None:
    prompt, fed = needle.tokens[: exact.prompt_len], needle.tokens[exact.prompt_len : -1]
    answer = needle.tokens[needle.answer_start :]

    def add(method: str, budget: float | None, kept: float, logits: Tensor) -> None:
        values = score_answer(logits, answer)
        results.add(needle_record(needle, question, method, budget, kept, values))

    for row in all_rows(model, exact, prompt, fed, pairs, batch_tokens):
        add(row.label, row.budget, row.kept_tokens, row.logits)
    if results.get(needle.name, question, FULL, None) is None:
        logits = continuation_logits(model, exact, fed, [None])[0]
        add(FULL, None, exact.prompt_len, logits)


def score_answer(logits: Tensor, answer: Sequence[int]) -> Record:
    """How well `logits` [T, vocabulary] end with the answer, all of it but its first token.

    With the question inside the prompt the first token comes from the exact prefill, on a server
    too, and says nothing of what was kept. Returns exact_match, 1 if each of the others is the most
    likely, and nll, their mean in nats.
    """
    expected = torch.tensor(answer[1:], device=logits.device)
    logits = logits[-len(expected) :]
    likelihoods = logits.float().log_softmax(dim=1).gather(1, expected[:, None])
    return {
        "exact_match": float((logits.argmax(dim=1) == expected).all()),
        "nll": -float(likelihoods.mean()),
    }


def needle_record(
    needle: Needle,
    question: str,
    method: str,
    budget: float | None,
    kept_tokens: float,
    values: Record,
) -> Record:
    return {
        "needle": needle.name,
        "kind": needle.kind,
        "length": needle.length,
        "depth": round(needle.depth, 4),
        "distractors": needle.distractors,
        "answer_tokens": needle.answer_tokens,
        "question": question,
        "method": method,
        "budget": budget,
        "kept_tokens": kept_tokens,
        **values,
    }


class Group(NamedTuple):
    """Needles that are averaged together."""

    question: str
    distractors: int
    kind: str


class Cell(NamedTuple):
    exact_match: Estimate
    nll: Estimate | None  # None through a server


def answerable(records: Iterable[Record]) -> list[Record]:
    """The records of needles that the model finds with the whole prompt, the full ones included."""
    kept = list(records)
    found = {
        (record["needle"], record["question"])
        for record in kept
        if record["method"] == FULL and record["exact_match"] == 1
    }
    return [record for record in kept if (record["needle"], record["question"]) in found]


def cells(records: Iterable[Record]) -> dict[Group, dict[tuple[str, float | None], Cell]]:
    """group -> (method, budget) -> cell, over the answerable needles."""
    found: dict[Group, dict[tuple[str, float | None], list[Record]]] = {}
    for record in answerable(records):
        group = Group(record["question"], record["distractors"], record["kind"])
        by_choice = found.setdefault(group, {})
        by_choice.setdefault((record["method"], record["budget"]), []).append(record)
    return {
        group: {choice: _cell(kept) for choice, kept in by_choice.items()}
        for group, by_choice in found.items()
    }


def _cell(records: Sequence[Record]) -> Cell:
    likelihoods = [record["nll"] for record in records if record["nll"] is not None]
    return Cell(
        mean([record["exact_match"] for record in records]),
        mean(likelihoods) if likelihoods else None,
    )


def tables(records: Iterable[Record]) -> Iterator[Table]:
    """Exact match and NLL, methods by budgets, one table for each question, distractors, kind."""
    kept = list(records)
    asked = _asked(kept)
    for group, by_choice in cells(kept).items():
        found = by_choice[FULL, None]
        title = f"{group.kind}, question {group.question}"
        if group.distractors:
            title += f", {group.distractors} distractors"
        title += f": exact match / NLL, {found.exact_match.n} of {asked[group]} found in full"
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("method")
        found_budgets = {budget for _, budget in by_choice if budget is not None}
        budgets = sorted(found_budgets, key=lambda budget: (budget <= 1, budget))
        for budget in budgets:
            table.add_column(f"b={budget:g}", justify="right")
        for method in dict.fromkeys(method for method, _ in by_choice if method != FULL):
            table.add_row(method, *(_shown(by_choice.get((method, b))) for b in budgets))
        yield table


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    shown = f"{cell.exact_match.value:.2f}"
    return shown if cell.nll is None else f"{shown} / {cell.nll.value:.2f}"


def _asked(records: Iterable[Record]) -> dict[Group, int]:
    """Needles of each group, found in full or not."""
    needles: dict[Group, set[str]] = {}
    for record in records:
        group = Group(record["question"], record["distractors"], record["kind"])
        needles.setdefault(group, set()).add(record["needle"])
    return {group: len(names) for group, names in needles.items()}


def as_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One object for each group, method and budget."""
    kept = list(records)
    asked = _asked(kept)
    return [
        {
            **group._asdict(),
            "asked": asked[group],
            "method": method,
            "budget": budget,
            "exact_match": cell.exact_match._asdict(),
            "nll": None if cell.nll is None else cell.nll._asdict(),
        }
        for group, by_choice in cells(kept).items()
        for (method, budget), cell in by_choice.items()
    ]


def plot_needles(records: Iterable[Record], path: Path) -> None:
    """Exact match by budget, a panel for each kind and place of the question."""
    from matplotlib.figure import Figure

    from benchmarks.fidelity.plots import PANEL, budget_axis, line, save

    groups = cells(list(records))
    if not groups:
        raise ValueError("no needle was found in full: nothing to draw")
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    size = (columns * PANEL[0], rows * PANEL[1])
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (group, by_choice) in zip(panels.flat, groups.items(), strict=False):
        methods = dict.fromkeys(method for method, _ in by_choice if method != FULL)
        for number, method in enumerate(methods):
            at = sorted(b for name, b in by_choice if name == method and b is not None and b > 1)
            found = [by_choice[method, budget].exact_match for budget in at]
            line(axes, number, method, at, found)
            budget_axis(axes, at)
        axes.set_title(f"{group.kind}, question {group.question}", fontsize="medium")
        axes.set_ylim(-0.05, 1.05)
    panels[0, 0].legend(fontsize="small")
    save(figure, path)


def plot_depths(records: Iterable[Record], path: Path, question: str = INSIDE) -> None:
    """Exact match by length and depth, all kinds together; methods in rows, budgets in columns."""
    from matplotlib.figure import Figure

    from benchmarks.fidelity.plots import save

    by_choice: dict[tuple[str, float], list[Record]] = {}
    for record in answerable(records):
        if record["method"] != FULL and record["question"] == question:
            by_choice.setdefault((record["method"], record["budget"]), []).append(record)
    if not by_choice:
        raise ValueError(
            f"no needle with the question {question} was found in full: nothing to draw"
        )
    methods = list(dict.fromkeys(method for method, _ in by_choice))
    budgets = sorted({budget for _, budget in by_choice}, key=lambda b: (b <= 1, b))
    lengths = sorted({record["length"] for found in by_choice.values() for record in found})
    figure = Figure(figsize=(2.6 * len(budgets), 2.2 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(budgets), squeeze=False, sharex=True, sharey=True)
    for (method, budget), found in by_choice.items():
        axes = panels[methods.index(method), budgets.index(budget)]
        rows = depth_by_length(found, lengths)
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{method}, b={budget:g}", fontsize="medium")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(DEPTH_BINS), [f"{i / DEPTH_BINS:g}" for i in range(DEPTH_BINS)])
    figure.colorbar(image, ax=panels, label="exact match")
    figure.supxlabel("tokens of the prompt")
    figure.supylabel("depth of the needle")
    save(figure, path)


def depth_by_length(records: Iterable[Record], lengths: Sequence[int]) -> list[list[float]]:
    """Mean exact match, DEPTH_BINS rows from the start of the text; NaN where there is none."""
    hits: dict[tuple[int, int], list[float]] = {}
    for record in records:
        part = min(int(record["depth"] * DEPTH_BINS), DEPTH_BINS - 1)
        hits.setdefault((part, record["length"]), []).append(record["exact_match"])
    return [
        [
            sum(hits[part, length]) / len(hits[part, length])
            if (part, length) in hits
            else float("nan")
            for length in lengths
        ]
        for part in range(DEPTH_BINS)
    ]


if __name__ == "__main__":
    main()
