# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of a comparison: medians with their spread, ratios of paired runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.serving.measurement import Measurement
from benchmarks.serving.workloads import LoadShape

Value = Callable[[Measurement], float | None]

CAPTION = (
    "median (lowest - highest) over the repeats; ratios are taken repeat by repeat. A prefill's "
    "time includes its compression. Decode phase: output tokens but the first ones, by the time in "
    "which no prefill ran. Held slots and requests in the batch are sampled twice a second."
)

ROWS: dict[str, tuple[Value, str]] = {
    "requests/s": (lambda m: m.request_throughput, ".3f"),
    "output tokens/s": (lambda m: m.output_throughput, ".1f"),
    "output tokens/s, decode phase": (lambda m: m.decode_throughput, ".1f"),
    "seconds in all": (lambda m: m.seconds, ".1f"),
    "share of prefill": (lambda m: m.prefill_share, ".0%"),
    "prompt tokens computed": (lambda m: m.counters.prefill_tokens, ",.0f"),
    "TTFT p50 (ms)": (lambda m: m.latencies["ttft_p50"], ",.0f"),
    "TTFT p99 (ms)": (lambda m: m.latencies["ttft_p99"], ",.0f"),
    "TPOT p50 (ms)": (lambda m: m.latencies["tpot_p50"], ",.0f"),
    "TPOT p99 (ms)": (lambda m: m.latencies["tpot_p99"], ",.0f"),
    "ITL p50 (ms)": (lambda m: m.latencies["itl_p50"], ",.0f"),
    "ITL p99 (ms)": (lambda m: m.latencies["itl_p99"], ",.0f"),
    "requests decoding at once, peak": (lambda m: m.peak_decoding, ".0f"),
    "  mean": (lambda m: m.mean_decoding, ".1f"),
    "requests in the batch, peak": (lambda m: m.peak_running, ".0f"),
    "slots held, peak": (lambda m: m.peak_used_slots, ",.0f"),
    "retractions": (lambda m: m.counters.retractions, ".0f"),
    "requests compressed": (lambda m: _compression(m, "compressed"), ".0f"),
    "steps down a ladder": (lambda m: _compression(m, "trims") or None, ".0f"),
}
ALLOWED = "  what the slots allow"
RATIOS: dict[str, Value] = {
    "output throughput": lambda m: m.output_throughput,
    "decode phase": lambda m: m.decode_throughput,
    "peak decoding": lambda m: m.peak_decoding,
}


def table(
    shape: LoadShape, pool_slots: int, targets: Sequence[str], measurements: Sequence[Measurement]
) -> Table:
    """A column for each target. Ratios to the first of them, and to `off` where it is one."""
    made = Table(
        title=f"{shape.workload}: {shape.requests} requests of {shape.prompt_tokens:,} prompt and "
        f"{shape.output_tokens} output tokens, {pool_slots:,} slots",
        caption=CAPTION,
    )
    made.add_column("")
    for target in targets:
        made.add_column(target, justify="right")
    rows = dict(ROWS)
    if not shape.shared:
        rows[ALLOWED] = (lambda m: m.allowed_decoding, ".0f")
    for name, (value, digits) in rows.items():
        found = [spread(measurements, target, value) for target in targets]
        if any(found):
            made.add_row(name, *(_cell(each, digits) for each in found))
    for baseline in dict.fromkeys([targets[0], *(t for t in targets if t == "off")]):
        made.add_section()
        for name, value in RATIOS.items():
            found = [paired_ratio(measurements, target, baseline, value) for target in targets]
            made.add_row(f"{name}, x {baseline}", *(_cell(each, ".2f") for each in found))
    return made


def plot(
    shape: LoadShape,
    targets: Sequence[str],
    measurements: Sequence[Measurement],
    machine: str,
    path: Path,
) -> None:
    """Requests decoding over time in the first repeat; seconds of prefill and of the rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    timeline, bars = figure.subplots(1, 2)
    for number, target in enumerate(targets):
        first = next(m for m in measurements if m.target == target)
        seconds, counts = decoding_over_time(first)
        timeline.step(seconds, counts, where="post", color=f"C{number}", label=target)
        own = [m for m in measurements if m.target == target]
        prefill = statistics.median(m.seconds * m.prefill_share for m in own)
        whole = statistics.median(m.seconds for m in own)
        throughput = statistics.median(m.output_throughput for m in own)
        bars.barh(number, prefill, color=f"C{number}", alpha=0.45)
        bars.barh(number, whole - prefill, left=prefill, color=f"C{number}")
        bars.text(whole, number, f" {throughput:.1f} tokens/s", va="center")
    timeline.set(xlabel="seconds", ylabel="requests decoding at once", title="the first repeat")
    timeline.legend()
    timeline.grid(True, alpha=0.3)
    bars.set_yticks(range(len(targets)), targets)
    bars.invert_yaxis()
    bars.margins(x=0.25)
    bars.set(xlabel="seconds: prefill (pale), the rest", title="until the last answer, median")
    figure.suptitle(
        f"{shape.workload}: {shape.requests} x {shape.prompt_tokens:,} prompt tokens, "
        f"{shape.output_tokens} output tokens"
    )
    figure.supxlabel(machine, fontsize=6)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Spread:
    """Of one value over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def spread(measurements: Sequence[Measurement], target: str, value: Value) -> Spread | None:
    """None if the target has no such value in any repeat."""
    found = [value(m) for m in measurements if m.target == target]
    known = [number for number in found if number is not None]
    return Spread.of(known) if known else None


def paired_ratio(
    measurements: Sequence[Measurement], target: str, baseline: str, value: Value
) -> Spread | None:
    """Of `target` over `baseline`, repeat by repeat; None if no repeat has both."""
    by_repeat = {
        name: {m.repeat: value(m) for m in measurements if m.target == name}
        for name in (target, baseline)
    }
    ratios = []
    for repeat, above in by_repeat[target].items():
        below = by_repeat[baseline].get(repeat)
        if above is not None and below:
            ratios.append(above / below)
    return Spread.of(ratios) if ratios else None


def decoding_over_time(measurement: Measurement) -> tuple[list[float], list[int]]:
    """Seconds at which an answer starts or ends, and how many run from then on."""
    edges = [(request.first_token, 1) for request in measurement.requests]
    edges += [(request.last_token, -1) for request in measurement.requests]
    seconds, counts, now = [0.0], [0], 0
    for second, step in sorted(edges):
        now += step
        seconds.append(second)
        counts.append(now)
    return seconds, counts


def _compression(measurement: Measurement, name: str) -> int | None:
    counted = measurement.counters.compression
    return None if counted is None else counted[name]


def _cell(found: Spread | None, digits: str) -> str:
    if found is None:
        return "-"
    if found.low == found.high:
        return f"{found.median:{digits}}"
    return f"{found.median:{digits}} ({found.low:{digits}} - {found.high:{digits}})"
