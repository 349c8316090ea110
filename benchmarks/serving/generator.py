# SPDX-License-Identifier: Apache-2.0
"""Runs SGLang's load generator against a server and takes in what it measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.workloads import Conversation, write_dataset
from lava_sglang.tools.load import LoadError

# -P: the folder of the script does not go in front of SGLang's imports.
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("recorded_generator.py")))


@dataclass(frozen=True)
class Traffic:
    """How the requests are sent. All times are the generator's."""

    output_tokens: int
    request_rate: float  # conversations a second, Poisson; infinite: all at once
    max_concurrency: int | None  # conversations at a time
    tokenizer: str  # folder or Hugging Face model id


@dataclass(frozen=True)
class RequestTimes:
    """One request. Seconds since the first one was sent."""

    start: float
    first_token: float
    last_token: float
    prompt_tokens: int  # the server's count
    output_tokens: int


@dataclass(frozen=True)
class GeneratorResult:
    """summary: what `sglang.bench_serving` writes to its --output-file."""

    summary: dict[str, Any]
    requests: tuple[RequestTimes, ...]


def generate(
    url: str,
    load: Sequence[Conversation],
    traffic: Traffic,
    seed: int,
    custom_params: dict[str, Any] | None = None,
    command: Sequence[str] = COMMAND,
) -> GeneratorResult:
    """One run, from an empty radix tree. Raises LoadError if it, or any request of it, fails."""
    with tempfile.TemporaryDirectory(prefix="lava-sglang-bench-") as name:
        folder = Path(name)
        times, summary, log = folder / "times.json", folder / "summary.jsonl", folder / "log"
        write_dataset(folder / "load.json", load)
        options = generator_options(url, traffic, seed, custom_params)
        options += ["--num-prompts", str(len(load)), "--dataset-path", str(folder / "load.json")]
        options += ["--output-file", str(summary)]
        with log.open("wb") as output:
            status = subprocess.run(
                [*command, str(times), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status != 0 or not times.is_file():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise LoadError(f"the load generator ended with status {status}:\n{tail}")
        return GeneratorResult(
            json.loads(summary.read_text().splitlines()[-1]),
            request_times(json.loads(times.read_text())),
        )


def generator_options(
    url: str, traffic: Traffic, seed: int, custom_params: dict[str, Any] | None
) -> list[str]:
    """Options of `sglang.bench_serving`, without the data set's and the output's paths."""
    options = {
        "--backend": "sglang-oai-chat",
        "--base-url": url,
        "--dataset-name": "agentic-trace",
        "--tokenizer": traffic.tokenizer,
        "--sharegpt-output-len": traffic.output_tokens,
        "--request-rate": "inf" if math.isinf(traffic.request_rate) else traffic.request_rate,
        "--seed": seed,
        "--warmup-requests": 0,
    }
    if traffic.max_concurrency is not None:
        options["--max-concurrency"] = traffic.max_concurrency
    if custom_params is not None:
        options["--extra-request-body"] = json.dumps({"custom_params": custom_params})
    words = [str(word) for pair in options.items() for word in pair]
    return [*words, "--flush-cache", "--disable-tqdm"]


def request_times(records: Sequence[dict[str, Any]]) -> tuple[RequestTimes, ...]:
    """Counted from the first request, in the order of their starts. Raises LoadError."""
    errors = [record["error"] for record in records if record["error"]]
    if errors:
        raise LoadError(f"{len(errors)} of {len(records)} requests failed: {errors[0]}")
    begin = min((record["start"] for record in records), default=0.0)
    found = [
        RequestTimes(
            record["start"] - begin,
            record["first_token"] - begin,
            record["last_token"] - begin,
            record["prompt_tokens"],
            record["output_tokens"],
        )
        for record in records
    ]
    return tuple(sorted(found, key=lambda times: times.start))
