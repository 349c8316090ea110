# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang demo`: shows a comparison while it runs, then its answers and its numbers."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lava_sglang.tools.demo.comparison import (
    Comparison,
    ComparisonSettings,
    load_prompts,
    run_prompts,
    server_options,
)
from lava_sglang.tools.demo.screen import live
from lava_sglang.tools.load import ConcurrencyResult, LoadProgress, RequestTrace
from lava_sglang.tools.passages import QUESTION, Prompt
from lava_sglang.tools.server_process import Server

_STATE_STYLES = {"waiting": "dim", "decoding": "yellow", "done": "green"}


def run(settings: ComparisonSettings, console: Console, json_path: Path | None = None) -> None:
    """Print the demo, and write its numbers to `json_path`; the server is stopped at the end.

    Raises ServerError, LoadError or PassageError, with the server stopped too.
    """
    console.print(
        f"[bold]{settings.requests} prompts of {settings.prompt_tokens:,} tokens, all sent at "
        f"once, to a server with {settings.slots:,} slots[/bold]\n"
        f"First with compression ({settings.label}), then without."
    )
    with console.status("Preparing the prompts ..."):
        prompts = load_prompts(settings)
    with _start(settings, console) as server:
        console.print(f"The server is ready at {server.url}, its log is {server.log_path}")
        compressed, exact = (
            _run(server, settings, prompts, compress, console) for compress in (True, False)
        )
    comparison = Comparison(settings, compressed, exact)
    console.print(f'\n[bold]Answers to "{QUESTION}"[/bold]')
    console.print(_answers(prompts, comparison))
    console.print("\n[bold]Summary[/bold]")
    console.print(_summary(comparison))
    console.print(
        f"\n[bold]{comparison.ratio:.1f} times as many requests decoded at the same time "
        "with compression.[/bold] The server is stopped."
    )
    if json_path is not None:
        json_path.write_text(json.dumps(comparison.as_json(), indent=2) + "\n")


def _start(settings: ComparisonSettings, console: Console) -> Server:
    # The warnings of what SGLang imports would hide its progress.
    quiet = {"PYTHONWARNINGS": "ignore"}
    server = Server(server_options(settings), port=settings.port, env=quiet)
    console.print(Text(" ".join(["$", "python", *server.command[1:]]), style="dim"))
    with live(console) as show:

        def starting(seconds: float, line: str) -> None:
            text = f"Starting the server, {seconds:.0f} s: {line}"
            show(Text(text, no_wrap=True, overflow="ellipsis"), text)

        server.progress = starting
        server.start()
    return server


def _run(
    server: Server,
    settings: ComparisonSettings,
    prompts: list[Prompt],
    compress: bool,
    console: Console,
) -> ConcurrencyResult:
    name = _run_name(settings, compress)
    with live(console) as show:

        def progress(now: LoadProgress) -> None:
            show(_picture(name, prompts, now), f"{name}, {now}")

        result = run_prompts(server, settings, prompts, compress, progress)
    console.print(
        f"{name}: {result.seconds:.0f} s, at most {result.peak_decoding} requests decoding at once"
    )
    return result


def _run_name(settings: ComparisonSettings, compress: bool) -> str:
    return f"With {settings.label}" if compress else "Without compression"


def _picture(name: str, prompts: list[Prompt], now: LoadProgress) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("text", no_wrap=True)
    table.add_column("state", min_width=8)
    table.add_column("tokens", justify="right")
    table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=1)
    for number, (prompt, request) in enumerate(zip(prompts, now.requests, strict=True), 1):
        state = Text(request.state, style=_STATE_STYLES[request.state])
        end = " ".join(request.text.split())[-50:]
        table.add_row(str(number), prompt.title, state, str(request.tokens), Text(end))
    return Group(Text(f"\n{name}, {now}", style="bold", no_wrap=True), table)


def _answers(prompts: list[Prompt], comparison: Comparison) -> RenderableType:
    blocks: list[RenderableType] = []
    pairs = zip(comparison.compressed.responses, comparison.exact.responses, strict=True)
    for number, (prompt, (compressed, exact)) in enumerate(zip(prompts, pairs, strict=True), 1):
        heading = Text(f"\n{number}. {prompt.title}: ", style="bold")
        heading.append(_kept(compressed), style="not bold")
        answers = Table.grid(padding=(0, 2))
        answers.add_row(Text("compressed", style="cyan"), Text(_one_paragraph(compressed)))
        answers.add_row(Text("exact", style="dim"), Text(_one_paragraph(exact)))
        blocks += [heading, Padding(answers, (0, 0, 0, 3))]
    return Group(*blocks)


def _kept(request: RequestTrace) -> str:
    info = request.compression
    if info.get("status") != "compressed":
        return f"served uncompressed ({info.get('reason', 'no reason given')})"
    shared = info["shared_prefix_tokens"]
    prefix = f", {shared} shared with other prompts" if shared else ""
    return (
        f"{info['prompt_tokens']:,} tokens{prefix}, {info['kept_tokens']:,} kept, "
        f"{info['slots_freed']:,} slots freed"
    )


def _one_paragraph(request: RequestTrace) -> str:
    ended = (request.meta_info.get("finish_reason") or {}).get("type") == "stop"
    return " ".join(request.text.split()) + ("" if ended else " ...")


def _summary(comparison: Comparison) -> RenderableType:
    both = (comparison.exact, comparison.compressed)
    freed = sum(r.compression.get("slots_freed", 0) for r in comparison.compressed.responses)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("without", comparison.settings.label):
        table.add_column(heading, justify="right")
    rows = {
        "requests decoding at once, peak (1)": [f"{r.peak_decoding:,}" for r in both],
        "slots held by requests, peak (2)": [f"{r.peak_used_slots:,}" for r in both],
        "slots freed by compression": ["0", f"{freed:,}"],
        "requests retracted for lack of slots": [f"{r.retractions:,}" for r in both],
        "tokens generated": [f"{r.generated_tokens:,}" for r in both],
        "seconds": [f"{r.seconds:.1f}" for r in both],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    notes = Text(
        "(1) Exact: the overlap of the times from each answer's first to its last token.\n"
        f"(2) Of {comparison.settings.slots:,}, read from the server every 0.2 s, as it stood "
        "after its last forward pass.",
        style="dim",
    )
    return Group(table, notes)
