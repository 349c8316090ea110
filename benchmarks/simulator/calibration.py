# SPDX-License-Identifier: Apache-2.0
"""Costs fitted to some runs of bench_serving.py, and what the model then says of all of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from serving.targets import BUDGET, METHOD, MIN_TOKENS, SETTINGS, Target

from lava_sglang.config import KVCompressionConfig
from simulator.costs import FittedCosts
from simulator.outcome import Outcome
from simulator.simulation import ServerShape, Simulation
from simulator.trace import Arrival, TraceError

STOCK_KERNEL = ("stock", "none")
"""Targets that decode on SGLang's own kernel, where the server runs without a GPU."""

METRICS = {
    "seconds in all": "seconds",
    "output tokens/s": "output_throughput",
    "TTFT p50 (s)": "ttft_p50",
    "share of prefill": "prefill_share",
    "requests decoding, peak": "peak_running",
    "  in a decode step, mean": "mean_running",
    "retractions": "retractions",
}


@dataclass(frozen=True)
class MeasuredRun:
    """One run of bench_serving.py: what the fit and the simulation need of its JSON."""

    values: dict[str, Any]

    @property
    def target(self) -> str:
        return str(self.values["target"])

    @property
    def stock_kernel(self) -> bool:
        return self.target in STOCK_KERNEL

    @property
    def moments(self) -> tuple[float, ...]:
        """Of decode steps: how many; sums of b, t, b * b and b * t over b requests, t seconds."""
        return tuple(self.values["counters"]["decode_moments"])

    @property
    def prefill_token(self) -> float:
        """Seconds, its part of the compression included."""
        counters = self.values["counters"]
        return float(counters["prefill_seconds"] / counters["prefill_tokens"])

    @property
    def suffix_tokens(self) -> int:
        """Of compressed requests."""
        return int((self.values["counters"]["compression"] or {}).get("suffix_tokens", 0))

    @property
    def mean_length(self) -> float:
        """Slots of a request in the middle of its answer."""
        held = self.values["prompt_tokens"] + self.values["output_tokens"] / 2
        compression = self.values["counters"]["compression"] or {}
        kept = compression.get("kept_tokens", 0) - compression.get("slots_trimmed", 0)
        return float(held - self.suffix_tokens + kept) / len(self.values["requests"])

    def measured(self, name: str) -> float:
        """A value of METRICS."""
        own = {
            "ttft_p50": lambda: self.values["latencies"]["ttft_p50"] / 1e3,
            "peak_running": lambda: self.values["peak_decoding"],
            "mean_running": lambda: self.moments[1] / max(self.moments[0], 1),
            "retractions": lambda: self.values["counters"]["retractions"] or 0,
        }
        return float(own[name]() if name in own else self.values[name])

    def arrivals(self) -> list[Arrival]:
        return [
            Arrival(
                request["start"],
                request["prompt_tokens"],
                request["output_tokens"],
                request["output_tokens"],
            )
            for request in self.values["requests"]
        ]


@dataclass(frozen=True)
class Prediction:
    """Of one target; `measured` and `predicted` have the keys of METRICS' values."""

    target: str
    fitted: bool  # its own runs were used for the fit
    measured: dict[str, float]
    predicted: dict[str, float]

    def error(self, name: str) -> float | None:
        """Predicted over measured, less one; None where nothing was measured."""
        measured = self.measured[name]
        return self.predicted[name] / measured - 1 if measured else None


def read_bench(path: Path) -> tuple[dict[str, Any], list[MeasuredRun]]:
    """Settings and runs. Raises TraceError if it is not a bench_serving.py file, or its requests
    depend on each other."""
    try:
        report = json.loads(path.read_text())
        settings, runs = report["settings"], [MeasuredRun(run) for run in report["runs"]]
        workload = settings["workload"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"--calibrate {path}: not a file of bench_serving.py ({error})") from None
    if workload not in ("unshared", "long-answers"):
        raise TraceError(
            f"--calibrate {path}: workload={workload}: accepts unshared or long-answers"
        )
    return settings, runs


def calibrate(
    settings: dict[str, Any],
    runs: Sequence[MeasuredRun],
    fit_targets: Iterable[str],
    shared_machine: bool = False,
) -> list[Prediction]:
    """Fit each kernel's costs to its `fit_targets`, then simulate every run. Raises TraceError.

    shared_machine: others slowed the machine down, more in some runs than in others. How much is
    read from the time of a prefill token, which should be the same in all runs of a kernel; each
    run's times are brought to the same speed before the fit, and the predictions to the run's.
    """
    names = list(fit_targets)
    known = list(dict.fromkeys(run.target for run in runs))
    for name in names:
        if name not in known:
            raise TraceError(f"--fit {name}: accepts any of {', '.join(known)}")
    costs, slowness = {}, {}
    for stock in {run.stock_kernel for run in runs}:
        own = [run for run in runs if run.stock_kernel == stock]
        used = [run for run in own if run.target in names]
        if not used:
            accepted = ", ".join(dict.fromkeys(run.target for run in own))
            raise TraceError(f"--fit {' '.join(names)}: accepts at least one of {accepted} too")
        usual = statistics.median(run.prefill_token for run in used)
        for run in own:
            slowness[id(run)] = run.prefill_token / usual if shared_machine else 1.0
        costs[stock] = fit(used, [slowness[id(run)] for run in used])
    predictions = []
    for target in known:
        own = [run for run in runs if run.target == target]
        outcomes = [
            simulate(settings, run, costs[run.stock_kernel].slower(slowness[id(run)])).as_json()
            for run in own
        ]
        measured, predicted = {}, {}
        for name in METRICS.values():
            measured[name] = statistics.median(run.measured(name) for run in own)
            predicted[name] = statistics.median(outcome[name] for outcome in outcomes)
        predictions.append(Prediction(target, target in names, measured, predicted))
    return predictions


def fit(runs: Sequence[MeasuredRun], slowness: Sequence[float] | None = None) -> FittedCosts:
    """Least squares of relative errors, no cost below 0. slowness: factor on each run's times.

    Where all runs have requests of one length, a request's own cost and that of its slots cannot
    be told apart: it is then all its slots'.
    """
    factors = slowness or [1.0] * len(runs)
    pairs = list(zip(runs, factors, strict=True))
    plain = [pair for pair in pairs if not pair[0].suffix_tokens] or pairs
    prefill_token = statistics.fmean(run.prefill_token / factor for run, factor in plain)
    over = suffixes = 0.0
    rows, times = [], []
    for run, factor in pairs:
        if run.suffix_tokens:
            tokens = run.values["counters"]["prefill_tokens"]
            over += (run.prefill_token / factor - prefill_token) * tokens
            suffixes += run.suffix_tokens
        count, b, t, bb, bt = run.moments
        length = run.mean_length
        for row, time in (
            ((count, b, b * length), t / factor),
            ((b, bb, bb * length), bt / factor),
        ):
            if time > 0:
                rows.append([value / time for value in row])
                times.append(1.0)
    if not rows:
        raise TraceError(f"--fit {runs[0].target}: its runs have no two decode steps in a row")
    matrix = np.array(rows)
    lengths = {round(run.mean_length) for run in runs}
    if max(lengths) < 1.1 * min(lengths):
        matrix[:, 1] = 0.0
    step, request, slot = nnls(matrix, np.array(times))[0]
    return FittedCosts(
        prefill_token, step, request, slot, max(over / suffixes, 0.0) if suffixes else 0.0
    )


def simulate(settings: dict[str, Any], run: MeasuredRun, costs: FittedCosts) -> Outcome:
    """The run's own requests on its own pool."""
    server = ServerShape(
        run.values["pool_slots"],
        settings["chunked_prefill_size"] or ServerShape.chunked_prefill_size,
        ignore_eos=True,  # as the generator sends them
    )
    config = config_of(run.target, settings["method"], settings["min_tokens"])
    return Simulation(server, costs, config).run(run.arrivals())


def config_of(target: str, method: str, min_tokens: int | None) -> KVCompressionConfig | None:
    """The settings that a target's requests are served with; None for stock's."""
    if target in (*STOCK_KERNEL, "off", "below-threshold"):
        return None
    parsed = Target.parse(target, method, min_tokens)
    options = dict(zip(parsed.server.options[::2], parsed.server.options[1::2], strict=True))
    values: dict[str, Any] = json.loads(options.get(SETTINGS, "{}"))
    values["method"] = options[METHOD]
    if MIN_TOKENS in options:
        values["min_tokens"] = int(options[MIN_TOKENS])
    if BUDGET in options:
        values["budget"] = [float(rung) for rung in options[BUDGET].split(",")]
    values |= (parsed.custom_params or {}).get("kv_compression", {})
    return KVCompressionConfig.parse(values)
