# SPDX-License-Identifier: Apache-2.0
"""Throughput, latency and concurrency of stock and compressed servers under the same load.

SGLang's own load generator (`sglang.bench_serving`) drives one server at a time; the servers take
turns in one run and get the same options. Options after `--` go to every server.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.serving.generator import Traffic
from benchmarks.serving.measurement import measure, warm_up
from benchmarks.serving.report import plot, table
from benchmarks.serving.targets import NAMES, ServerKind, Target, in_turn
from benchmarks.serving.workloads import WORKLOADS, Conversation, LoadShape, conversations
from lava_sglang.config import KVCompressionError
from lava_sglang.methods import METHOD_CHOICES
from lava_sglang.tools.load import LoadError
from lava_sglang.tools.machine import FILE_WIDTH, machine_line
from lava_sglang.tools.passages import PassageError, python_topics, text_files
from lava_sglang.tools.server_process import Server, ServerError, machine_options

CHUNKED_PREFILL_SIZE = 1024

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    progress = Console(stderr=True)

    def say(line: str) -> None:
        progress.print(line, highlight=False, markup=False, soft_wrap=True)

    try:
        report = run(arguments, say)
    except (KVCompressionError, PassageError, ServerError, LoadError) as error:
        parser.exit(1, f"{error}\n")
    shape, names, measurements = report["shape"], report["targets"], report["runs"]
    console.print(table(shape, measurements[0].pool_slots, names, measurements))
    console.print(report["machine"], highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(arguments, report), indent=2) + "\n")
    if arguments.plot is not None:
        plot(shape, names, measurements, report["machine"], arguments.plot)


def run(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Shape, target names, machine line and all measurements.

    Raises KVCompressionError, PassageError, ServerError, LoadError or httpx.HTTPError, with the
    server stopped.
    """
    urls = dict(_name_and_url(pair) for pair in arguments.base_url)
    targets = [
        Target.parse(name, arguments.method, arguments.min_tokens)
        for name in list(urls) or arguments.compare
    ]
    shape = LoadShape(
        arguments.workload,
        arguments.requests,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.turns,
        arguments.own_tokens,
    )
    loads = load_of_each_repeat(arguments, shape)
    traffic = Traffic(
        shape.output_tokens,
        arguments.request_rate,
        arguments.max_concurrency,
        arguments.model_path,
    )
    machine = machine_line()
    measurements = []
    for start in in_turn(targets, arguments.repeats):
        with _served(start[0][1], urls, arguments, say) as url:
            warm_up(url, loads[0][0])
            for repeat, target in start:
                seed = arguments.seed + repeat
                found = measure(url, target, loads[repeat], traffic, repeat, seed)
                say(
                    f"{target.name}, repeat {repeat + 1} of {arguments.repeats}: "
                    f"{found.seconds:.1f} s, {found.output_throughput:.1f} output tokens/s, at "
                    f"most {found.peak_decoding} decoding at once"
                )
                measurements.append(found)
    names = [target.name for target in targets]
    return {"shape": shape, "targets": names, "machine": machine, "runs": measurements}


def load_of_each_repeat(
    arguments: argparse.Namespace, shape: LoadShape
) -> list[list[Conversation]]:
    """Takes seconds: imports transformers. Each repeat draws other passages of the texts."""
    texts = text_files(arguments.text_dir) if arguments.text_dir else python_topics()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    return [
        conversations(shape, tokenizer, texts, arguments.seed + repeat)
        for repeat in range(arguments.repeats)
    ]


def as_json(arguments: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Everything that was asked for and measured."""
    settings = {
        name: value if isinstance(value, int | float | list | None) else str(value)
        for name, value in vars(arguments).items()
    }
    if math.isinf(arguments.request_rate):
        settings["request_rate"] = None
    runs = [measurement.as_json() for measurement in report["runs"]]
    return {"settings": settings, "machine": report["machine"], "runs": runs}


@contextmanager
def _served(
    target: Target, urls: dict[str, str], arguments: argparse.Namespace, say: Say
) -> Iterator[str]:
    """The target's server: the one that runs at its URL, or one that is started and stopped."""
    if urls:
        yield urls[target.name]
        return
    say(f"starting a server: {' '.join(target.server.options) or 'stock'}")
    options = server_options(arguments, target.server)
    with Server(options, port=arguments.port, env=dict(target.server.env)) as server:
        yield server.url


def server_options(arguments: argparse.Namespace, kind: ServerKind) -> list[str]:
    """The command line of a server: `kind` is all in which the servers differ."""
    options = {
        "--model-path": arguments.model_path,
        "--max-total-tokens": arguments.slots,
        "--chunked-prefill-size": arguments.chunked_prefill_size,
        # Used slots are published after every decode step, not every 15.
        "--load-snapshot-publish-interval": 1,
    }
    words = [str(word) for name, value in options.items() if value for word in (name, value)]
    words += ["--enable-metrics", *machine_options()]
    return [*words, *kind.options, *arguments.server_args]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", required=True, help="folder or Hugging Face model id")
    add("--text-dir", type=Path, help="take the texts from its .txt files (Python's own help)")
    workloads = "; ".join(f"{name}: {what}" for name, what in WORKLOADS.items())
    add("--workload", choices=WORKLOADS, default="unshared", help=workloads)
    add("--requests", type=int, default=8, help="conversations (%(default)s)")
    add("--prompt-tokens", type=int, default=1000, help="of a prompt (%(default)s)")
    add("--output-tokens", type=int, default=64, help="of an answer, exactly (%(default)s)")
    add("--turns", type=int, default=1, help="of a conversation (chat)")
    add("--own-tokens", type=int, default=0, help="text of its own a request adds (system-prompt)")
    add("--request-rate", type=float, default=math.inf, help="conversations a second (all at once)")
    add("--max-concurrency", type=int, help="conversations at a time (all)")
    targets = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    add(
        "--compare",
        nargs="+",
        default=["stock", "off", "lava@0.25"],
        metavar="TARGET",
        help=f"METHOD@BUDGET, METHOD@BUDGET:SETTING=VALUE, or one of: {targets} (%(default)s)",
    )
    add("--method", choices=METHOD_CHOICES[1:], default="lava", help="of off and below-threshold")
    add("--min-tokens", type=int, help="the servers' --kv-compression-min-tokens")
    add("--slots", type=int, default=2048, help="size of the KV pool, 0: SGLang's (%(default)s)")
    add(
        "--chunked-prefill-size",
        type=int,
        default=CHUNKED_PREFILL_SIZE,
        help="tokens of a prefill step, 0: SGLang's (%(default)s)",
    )
    add("--repeats", type=int, default=2, help="times that the servers take turns (%(default)s)")
    add("--seed", type=int, default=0, help="of the passages and the arrivals (%(default)s)")
    add("--port", type=int, default=0, help="port of the servers (a free one)")
    add(
        "--base-url",
        nargs="+",
        default=[],
        metavar="TARGET=URL",
        help="use these running servers, and compare these targets",
    )
    add("--json", type=Path, help="write the result to this file too")
    add("--plot", type=Path, help="draw the result to this PNG (needs matplotlib)")
    add("server_args", nargs="*", metavar="-- OPTION", help="further options of every server")
    return parser


def _name_and_url(pair: str) -> tuple[str, str]:
    name, equals, url = pair.partition("=")
    if not equals or not url.startswith(("http://", "https://")):
        raise LoadError(f"--base-url {pair}: accepts TARGET=http://HOST:PORT")
    return name, url.rstrip("/")


if __name__ == "__main__":
    main()
