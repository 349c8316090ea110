# SPDX-License-Identifier: Apache-2.0
"""How many requests decode at once in a small pool, with compression off and on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import machine_line
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lava_sglang.tools.demo.comparison import (
    Comparison,
    ComparisonSettings,
    load_prompts,
    run_prompts,
    server_options,
)
from lava_sglang.tools.demo.load import ConcurrencyResult
from lava_sglang.tools.demo.screen import live
from lava_sglang.tools.server_process import Server


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ComparisonSettings.add_arguments(parser, requests=12)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    arguments = parser.parse_args(argv)
    settings = ComparisonSettings.from_arguments(arguments)
    comparison = measure(settings)
    console = Console()
    console.print(_table(settings, comparison))
    console.print(f"{comparison.ratio:.2f} times as many requests decode at once.")
    console.print(machine_line(), highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(settings, comparison), indent=2) + "\n")


def measure(settings: ComparisonSettings) -> Comparison:
    """Start a server, run the prompts with compression off, then on, stop the server."""
    prompts = load_prompts(settings)
    with live(Console(stderr=True)) as show:

        def starting(seconds: float, line: str) -> None:
            show_line(f"Starting the server, {seconds:.0f} s: {line}")

        def show_line(line: object) -> None:
            show(Text(str(line), no_wrap=True, overflow="ellipsis"), str(line))

        with Server(server_options(settings), port=settings.port, progress=starting) as server:
            exact, compressed = (
                run_prompts(server, settings, prompts, compress, show_line)
                for compress in (False, True)
            )
    return Comparison(compressed, exact)


def as_json(settings: ComparisonSettings, comparison: Comparison) -> dict[str, Any]:
    """Settings, machine, and per run the peaks, seconds and the spans of all requests."""
    return {
        "settings": {**vars(settings), "text_dir": settings.text_dir and str(settings.text_dir)},
        "machine": machine_line(),
        "ratio": comparison.ratio,
        "off": _run_as_json(comparison.exact),
        "on": _run_as_json(comparison.compressed),
    }


def _table(settings: ComparisonSettings, comparison: Comparison) -> Table:
    both = (comparison.exact, comparison.compressed)
    table = Table(
        title=f"{settings.requests} prompts of {settings.prompt_tokens:,} tokens, up to "
        f"{settings.max_new_tokens} new ones, {settings.slots:,} slots"
    )
    for heading in ("", "off", settings.label):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("requests decoding at once, peak", *(str(r.peak_decoding) for r in both))
    table.add_row("slots held, sampled peak", *(f"{r.peak_used_slots:,}" for r in both))
    table.add_row("requests retracted", *(str(r.retractions) for r in both))
    table.add_row("tokens generated", *(str(r.generated_tokens) for r in both))
    table.add_row("seconds", *(f"{r.seconds:.1f}" for r in both))
    return table


def _run_as_json(result: ConcurrencyResult) -> dict[str, Any]:
    return {
        "peak_decoding": result.peak_decoding,
        "peak_used_slots": result.peak_used_slots,
        "seconds": result.seconds,
        "retractions": result.retractions,
        "requests": [
            {
                "first_token": response.first_token,
                "last_token": response.last_token,
                "tokens": response.tokens,
                "kv_compression": response.compression,
            }
            for response in result.responses
        ],
    }


if __name__ == "__main__":
    main()
