# SPDX-License-Identifier: Apache-2.0
"""A model of a server under load, to choose a budget: what it admits, how many wait and how long.

Admission is the real code, SGLang's and ours; slots are counted and time is modelled. By default
for an 8B model on one H100, from their data sheets and three assumed efficiencies. --calibrate
fits the times to runs of bench_serving.py instead, and says how well the model predicts the others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from machine import FILE_WIDTH, machine_line
from rich.console import Console
from simulator.calibration import calibrate, read_bench
from simulator.costs import CHIPS, MODELS, ModelShape, RooflineCosts
from simulator.report import calibration_table, plot_budgets, plot_rates, sweep_table
from simulator.runtime import publish_settings
from simulator.simulation import ServerShape
from simulator.sweep import STOCK, Case, Point, sweep
from simulator.trace import Lengths, Synthetic, TraceError, read_trace

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.methods import METHOD_CHOICES


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    publish_settings()
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    try:
        answer = _calibrated if arguments.calibrate else _swept
        report = answer(arguments, console)
    except (TraceError, KVCompressionError) as error:
        parser.exit(1, f"{error}\n")
    report["machine"] = machine_line()
    console.print(report["machine"], highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _swept(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    model = MODELS.get(arguments.model) or ModelShape.read(Path(arguments.model))
    costs = RooflineCosts(
        model,
        CHIPS[arguments.chip],
        arguments.flops_efficiency,
        arguments.bandwidth_efficiency,
        arguments.kv_efficiency,
        arguments.overhead_ms / 1e3,
    )
    slots = arguments.slots or costs.pool_slots(arguments.memory_fraction)
    if slots < 1:
        raise TraceError(
            f"--chip {arguments.chip}: the {model.weight_bytes / 1e9:.0f} GB of {model.name} leave "
            "no room for slots: accepts a chip with more memory, or --slots"
        )
    queries = model.layers * model.query_heads * model.head_dim * model.bytes_per_value
    server = ServerShape(
        slots,
        arguments.chunked_prefill_size,
        window_bytes=KVCompressionConfig().window_size * queries,
    )
    names = ("method", "min_tokens", "trigger", "admit_ahead", "decode_interval")
    compression = {name: getattr(arguments, name) for name in names}
    title = f"{model.name}, {CHIPS[arguments.chip].name}, {slots:,} slots"
    points: list[Point] = []
    progress = Console(stderr=True)
    begin = time.perf_counter()
    for point in sweep(server, costs, compression, arguments.budgets, make_cases(arguments)):
        points.append(point)
        speed = (point.outcome.answered + point.outcome.refused) / point.wall_seconds
        progress.print(
            f"prompt {point.prompt_tokens}, rate {point.rate}, budget {point.budget}: "
            f"{point.wall_seconds:.1f} s, {speed:,.0f} requests simulated a second",
            highlight=False,
            soft_wrap=True,
        )
    console.print(sweep_table(title, points))
    console.print(f"Simulated in {time.perf_counter() - begin:.0f} s.", highlight=False)
    if arguments.plot is not None:
        draw = plot_rates if len(arguments.rate) > 1 else plot_budgets
        load = f"{arguments.requests:,} requests, {arguments.output_tokens} output tokens"
        draw(f"{title}; {arguments.trace or load}", points, arguments.plot)
    settings = {key: _plain(value) for key, value in vars(arguments).items()}
    return {"settings": settings, "points": [point.as_json() for point in points]}


def _calibrated(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings, runs = read_bench(arguments.calibrate)
    predictions = calibrate(settings, runs, arguments.fit, arguments.shared_machine)
    console.print(calibration_table(predictions))
    return {"settings": settings, "predictions": [vars(each) for each in predictions]}


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    """Raises TraceError."""
    if arguments.trace is not None:
        return [Case(None, None, partial(read_trace, arguments.trace))]
    for name, values in (("--rate", arguments.rate), ("--prompt-tokens", arguments.prompt_tokens)):
        for value in values:
            if value <= 0:
                raise TraceError(f"{name} {value:g}: accepts numbers above 0")
    return [
        Case(
            prompt_tokens,
            rate,
            lambda prompt_tokens=prompt_tokens, rate=rate: Synthetic(  # type: ignore[misc]
                arguments.requests,
                rate,
                Lengths(prompt_tokens, arguments.prompt_spread),
                Lengths(arguments.output_tokens, arguments.output_spread),
                arguments.asked,
                arguments.groups,
                arguments.shared_tokens,
                arguments.seed,
            ),
        )
        for prompt_tokens in arguments.prompt_tokens
        for rate in arguments.rate
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"config.json, or one of {', '.join(MODELS)}")
    add("--chip", choices=CHIPS, default="h100")
    add("--slots", type=int, help="of the KV pool (what the chip's memory holds)")
    add("--memory-fraction", type=float, default=0.85, help="for weights and KV (%(default)s)")
    add("--flops-efficiency", type=float, default=0.5, help="assumed (%(default)s)")
    add("--bandwidth-efficiency", type=float, default=0.7, help="assumed (%(default)s)")
    add("--kv-efficiency", type=float, default=1.0, help="our kernel against the stock one")
    add("--overhead-ms", type=float, default=1.0, help="of a step, assumed (%(default)s)")
    add("--chunked-prefill-size", type=int, default=8192, help="(%(default)s)")
    add("--method", choices=METHOD_CHOICES[1:], default="lava", help="(%(default)s)")
    add("--min-tokens", type=int, default=KVCompressionConfig().min_tokens, help="(%(default)s)")
    add("--trigger", choices=["always", "pressure"], default="always", help="(%(default)s)")
    add("--decode-interval", type=int, help="as the setting of this name")
    add("--admit-ahead", action="store_true", help="as the setting of this name")
    add(
        "--budgets",
        nargs="+",
        default=[STOCK, "0.5", "0.25", "0.125", "0.0625"],
        help="1 is stock; a ladder has commas: 0.5,0.25,0.125 (%(default)s)",
    )
    add("--requests", type=int, default=2000, help="(%(default)s)")
    add("--rate", type=float, nargs="+", default=[math.inf], help="requests a second (all at once)")
    lengths = [2000, 8000, 32000]
    add("--prompt-tokens", type=int, nargs="+", default=lengths, help="mean (%(default)s)")
    add("--prompt-spread", type=float, default=0.0, help="deviation of the logarithm (%(default)s)")
    add("--output-tokens", type=int, default=512, help="mean (%(default)s)")
    add("--output-spread", type=float, default=0.5, help="deviation of the logarithm (%(default)s)")
    add("--asked", type=float, default=4.0, help="max_new_tokens, by the mean output (%(default)s)")
    add("--groups", type=int, default=0, help="of requests that share the start of their prompts")
    add("--shared-tokens", type=int, default=0, help="that a group shares (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--trace", type=Path, help="JSONL: seconds, prompt_tokens, output_tokens, ... a line")
    add("--calibrate", type=Path, help="a --json of bench_serving.py: fit, predict, compare")
    add(
        "--fit",
        nargs="+",
        default=["stock", "off"],
        help="targets of that file that the costs are fitted to (%(default)s)",
    )
    add(
        "--shared-machine",
        action="store_true",
        help="others slowed it down: take each run's speed from its own prefill",
    )
    add("--json", type=Path, help="write the result to this file too")
    add("--plot", type=Path, help="draw the result to this PNG (needs matplotlib)")
    return parser


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isinf(value):
        return None
    return value if isinstance(value, int | float | str | None) else str(value)


if __name__ == "__main__":
    main()
