# SPDX-License-Identifier: Apache-2.0
"""What compression costs in the scores of published benchmarks, through a running server.

LongBench, RULER's synthetic tasks and InfiniteBench's retrieval, each with its own metric. One
server with `--kv-compression` answers for every method and budget, and for the whole prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from asker import Asker
from client import settings_of
from needle_summary import FULL
from options import (
    add_method_arguments,
    add_model_arguments,
    add_result_arguments,
    integers,
    load_tokenizer,
    open_results,
    positive,
    read_server_settings,
    server_variants_of,
    write_summary,
)
from results import Results
from rich.console import Console
from rich.progress import Progress
from tasks_summary import Choice, as_json, tables
from tasksets.sample import Fitter, Sample
from tasksets.suites import samples, task_names
from transformers import AutoConfig

KEY_FIELDS = ("task", "sample", "method", "budget")
TIMEOUT_SECONDS = 3600


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, in_process=False)
    add_method_arguments(parser, methods=["lava_span", "lava"], budgets="0.25,0.125")
    add_result_arguments(parser)
    parser.add_argument("--server", metavar="URL", required=True, help="of lava-sglang")
    parser.add_argument(
        "--tasks", nargs="+", default=["ruler"], help="names; longbench, ruler, infinitebench: all"
    )
    parser.add_argument(
        "--lengths", type=integers, default="4096", help="tokens of made-up samples and replies"
    )
    parser.add_argument(
        "--samples", type=positive, default=50, help="of every task and length, the first ones"
    )
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once")
    parser.add_argument(
        "--max-length",
        type=positive,
        help="tokens of prompt and reply; longer prompts lose their middle (default: the model's)",
    )
    parser.add_argument(
        "--template-options",
        type=json.loads,
        default={},
        help='of the chat template, a JSON object: {"enable_thinking": false}',
    )
    arguments = parser.parse_args(argv)
    if arguments.max_length is None:
        arguments.max_length = longest(arguments.model_path)
    read_server_settings(arguments)
    fields = ("server_settings", "data", "max_length", "template_options")
    results = open_results(arguments, KEY_FIELDS, "tasks", *fields)
    measure(arguments, results)
    console = Console()
    for table in tables(results):
        console.print(table)
    write_summary(arguments, as_json(results), arguments.server)
    if arguments.plot is not None:
        from plots import plot_tasks

        plot_tasks(results, arguments.plot)


def longest(model_path: str | Path) -> int:
    """Tokens that the model was trained for. Raises ValueError if its config does not say."""
    found = getattr(AutoConfig.from_pretrained(model_path), "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ValueError("--max-length: needed, the model's config has no max_position_embeddings")
    return found


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Adds what `results` lacks."""
    choices: list[Choice] = [(FULL, None)]
    choices += [(v.label, b) for v in server_variants_of(arguments) for b in arguments.budgets]
    names = task_names(arguments.tasks)
    tokenizer = load_tokenizer(arguments)
    fitter = Fitter(tokenizer, arguments.max_length, arguments.template_options)
    console = Console(stderr=True)
    with console.status("Samples"):
        wanted = (arguments.data, arguments.lengths, arguments.samples, arguments.seed)
        found = list(samples(names, *wanted, fitter))
    missing = [
        (sample, [c for c in choices if results.get(sample.task, sample.name, *c) is None])
        for sample in found
    ]
    asyncio.run(_ask_all(arguments, missing, results, console))


async def _ask_all(
    arguments: argparse.Namespace,
    missing: Sequence[tuple[Sample, list[Choice]]],
    results: Results,
    console: Console,
) -> None:
    """The choices of one sample in turn, which the radix tree makes cheap; samples at once."""
    turn = asyncio.Semaphore(arguments.concurrency)
    client = httpx.AsyncClient(
        base_url=arguments.server, timeout=TIMEOUT_SECONDS, limits=httpx.Limits(), trust_env=False
    )
    with Progress(console=console) as progress:
        bar = progress.add_task("Requests", total=sum(len(choices) for _, choices in missing))
        async with client:
            asker = Asker(client, arguments.template_options)

            async def ask(sample: Sample, choices: Sequence[Choice]) -> None:
                async with turn:
                    for choice in choices:
                        results.add(await _record(asker, sample, choice))
                        progress.advance(bar)

            asked = [asyncio.create_task(ask(*pair)) for pair in missing]
            try:
                await asyncio.gather(*asked)
            finally:
                for one in asked:
                    one.cancel()


async def _record(asker: Asker, sample: Sample, choice: Choice) -> dict[str, Any]:
    method, budget = choice
    answer = await asker.ask(sample, settings_of(method, budget))
    return {
        "suite": sample.suite,
        "task": sample.task,
        "sample": sample.name,
        "method": method,
        "budget": budget,
        "score": round(sample.score(answer.text), 6),
        **answer._asdict(),
        "answers": sample.answers,
    }


if __name__ == "__main__":
    main()
