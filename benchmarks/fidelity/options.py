# SPDX-License-Identifier: Apache-2.0
"""The options that the commands here share, and the model and methods that they name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.fidelity import methods, peers
from benchmarks.fidelity.methods import Row, Variant, parse_budgets, parse_variants
from benchmarks.fidelity.peers import Peer, parse_peer
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.server import check_scope
from lava_sglang.methods import METHODS
from lava_sglang.tools.client import ServerClient
from lava_sglang.tools.inspection.prefill import Prefill, load_model
from lava_sglang.tools.machine import commit, cpu_model

BUDGETS = "64,128,256,512,0.25"

Contender = Variant | Peer
AnyContender = TypeVar("AnyContender", bound=Contender)


def add_model_arguments(parser: argparse.ArgumentParser, in_process: bool = True) -> None:
    """in_process: whether the command may run the model itself."""
    group = parser.add_argument_group("model and text")
    group.add_argument("--model-path", required=True, help="Hugging Face folder or hub name")
    if in_process:
        group.add_argument("--dtype", default="float32", help="of the model and its KV")
        group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument(
        "--data",
        help="folder of .txt books and LongBench .jsonl files, or 'hub' for PG-19 and LongBench "
        "from Hugging Face (needs the datasets package); default: Python's own reference",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of texts")


def add_method_arguments(
    parser: argparse.ArgumentParser, methods: Sequence[str] = tuple(METHODS), budgets: str = BUDGETS
) -> None:
    """methods, budgets: the defaults."""
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="METHOD",
        help="names, with settings of their own after a colon: lava:pool_width=15,window_size=64",
    )
    group.add_argument(
        "--config", type=json.loads, default={}, help="settings of all methods, a JSON object"
    )
    group.add_argument(
        "--methods-from",
        type=Path,
        help="Python file that adds to lava_sglang.methods.METHODS",
    )
    group.add_argument(
        "--budgets",
        type=_argument(parse_budgets),
        default=budgets,
        help=f"tokens, or fractions of the prompt, window included (default {budgets})",
    )


def add_batch_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens", type=int, default=512, help="new tokens in a forward pass, all rows"
    )


def add_result_arguments(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--results", type=Path, help="JSON lines, one per measurement")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what --results holds (default)",
    )
    group.add_argument("--json", type=Path, help="write the summary to this file too")
    if plot:
        group.add_argument("--plot", type=Path, help="draw the summary to this file (.png, .svg)")


def load_model_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model of `--model-path`, for `lava_sglang.tools.inspection`, and its tokenizer."""
    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype={arguments.dtype}: accepts float32, bfloat16 or float16")
    model = load_model(arguments.model_path, dtype, arguments.device)
    return model, load_tokenizer(arguments)


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    return AutoTokenizer.from_pretrained(arguments.model_path)


def variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """`--methods`, which a server may run too: ours only."""
    return parse_variants(arguments.methods, arguments.config, arguments.methods_from)


def contenders_of(arguments: argparse.Namespace) -> list[Contender]:
    """`--methods` of a run in process: ours and peers, in the order given."""
    found: list[Contender] = []
    for spec in arguments.methods:
        if spec.partition(":")[0] == peers.PREFIX:
            found.append(parse_peer(spec, arguments.config))
        else:
            found += parse_variants([spec], arguments.config, arguments.methods_from)
    return found


def pairs_of(
    contenders: Sequence[AnyContender], budgets: Sequence[float]
) -> list[tuple[AnyContender, float]]:
    """Each contender at each budget, but for numbers of tokens that do not exceed its window.

    Those are named on stderr, one line a contender. Raises ValueError if they are all there is.
    """
    pairs: list[tuple[AnyContender, float]] = []
    left_out: list[str] = []
    for contender in contenders:
        window = contender.window_size
        low = [budget for budget in budgets if 1 < budget <= window]
        pairs += [(contender, budget) for budget in budgets if budget not in low]
        if low:
            tokens = ",".join(f"{budget:g}" for budget in low)
            reason = f"--budgets {tokens}: must exceed its window {window}"
            left_out.append(f"{contender.label}: {reason}")
    if left_out and not pairs:
        raise ValueError("; ".join(left_out))
    console = Console(stderr=True)
    for line in left_out:
        console.print(f"Left out: {line}", markup=False, highlight=False, soft_wrap=True)
    return pairs


def all_rows(
    model: Any,
    exact: Prefill,
    prompt: Sequence[int],
    fed: Sequence[int],
    pairs: Sequence[tuple[Contender, float]],
    batch_tokens: int,
) -> Iterator[Row]:
    """As `methods.rows`: ours from the exact prefill, then the peers, which prefill themselves."""
    ours = [(contender, b) for contender, b in pairs if isinstance(contender, Variant)]
    theirs = [(contender, b) for contender, b in pairs if isinstance(contender, Peer)]
    yield from methods.rows(model, exact, fed, ours, batch_tokens)
    yield from peers.rows(model, prompt, fed, theirs)


def server_variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """`--methods` as a request can name them: the other settings are the server's own."""
    for spec in arguments.methods:
        if spec not in METHODS:
            raise ValueError(f"--methods {spec}: accepts {', '.join(METHODS)} with --server")
    if arguments.config or arguments.methods_from is not None:
        raise ValueError(
            "--config and --methods-from: not with --server, which is started with its settings"
        )
    return variants_of(arguments)


def read_server_settings(arguments: argparse.Namespace) -> None:
    """Sets `arguments.server_settings`. Raises ValueError unless every prompt is compressed whole,
    whatever was sent before."""
    with ServerClient(arguments.server) as server:
        check_scope(server, "prompt")
        arguments.server_settings = server.settings()


def open_results(
    arguments: argparse.Namespace, key_fields: tuple[str, ...], command: str, *fields: str
) -> Results:
    """`--results`, for these settings: model, seed, `--config`, dtype if there is one, and the
    named options."""
    dtype = ("dtype",) if "dtype" in arguments else ()
    names = ("model_path", *dtype, "seed", "config", *fields)
    settings = {"command": command} | {name: getattr(arguments, name) for name in names}
    return Results(arguments.results, key_fields, settings, arguments.resume)


def write_summary(arguments: argparse.Namespace, summary: Any, server: str | None = None) -> None:
    """To `--json`, if given, with the commit and machine that it belongs to.

    server: the URL of one that was measured; the machine is then its client's.
    """
    if arguments.json is None:
        return
    if server is None:
        made = {"machine": cpu_model(), "device": arguments.device}
    else:
        made = {"server": server, "client_machine": cpu_model()}
    report = {**made, "commit": commit(), "summary": summary}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def integers(text: str) -> list[int]:
    """Whole numbers of a comma-separated list, from 1 up."""
    values = [int(item) for item in text.split(",")]
    if min(values) < 1:
        raise ValueError(f"{text!r}: accepts whole numbers from 1 up")
    return values


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: accepts a whole number from 1 up")
    return int(text)


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows only this error's message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
