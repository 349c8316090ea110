# SPDX-License-Identifier: Apache-2.0
"""Whether a compressed prompt still answers a question about one made-up fact in real text.

In process by teacher forcing, with the question inside the compressed prompt and after it; or on a
running server by the text that it generates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client import ServerClient, settings_of
from contexts import Cutter
from haystack import KINDS, Needle, needles
from needle_summary import AFTER, FULL, INSIDE, as_json, tables
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
    server_variants_of,
    write_summary,
)
from results import Record, Results
from rich.console import Console
from rich.progress import track
from texts import load_texts
from trial import Trial, needle_record
from variants import Contender

KEY_FIELDS = ("needle", "question", "method", "budget")


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
        from plots import plot_needles

        plot_needles(results, arguments.plot)
    if arguments.plot_depths is not None:
        from plots import plot_depths

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
            Trial(model, needle, results).run(missing, arguments.batch_tokens)


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
                    results.add(_ask(server, needle, method, budget))


def _ask(server: ServerClient, needle: Needle, method: str, budget: float | None) -> Record:
    # Else the prompt is found in the radix tree, and there is nothing of its own to compress.
    server.flush_cache()
    prompt = needle.tokens[: needle.answer_start]
    reply = server.generate(prompt, needle.answer_tokens + 2, settings_of(method, budget))
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


if __name__ == "__main__":
    main()
