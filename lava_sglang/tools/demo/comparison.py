# SPDX-License-Identifier: Apache-2.0
"""The same prompts on one server with compression on and off: settings, server, two runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lava_sglang.config import KVCompressionConfig
from lava_sglang.methods import METHOD_CHOICES
from lava_sglang.tools.client import OFF
from lava_sglang.tools.load import ConcurrencyResult, LoadProgress, measure_concurrency
from lava_sglang.tools.machine import machine_line
from lava_sglang.tools.passages import Prompt, long_prompts, python_topics, text_files
from lava_sglang.tools.server_process import Server, machine_options

CHUNKED_PREFILL_SIZE = 1024


@dataclass(frozen=True)
class ComparisonSettings:
    """Raises KVCompressionError for a bad method or budget."""

    model_path: str  # folder or Hugging Face model id
    text_dir: Path | None  # folder of .txt files; None: Python's own help
    method: str
    budget: float
    requests: int
    prompt_tokens: int
    max_new_tokens: int
    slots: int  # of the KV pool, one token each
    port: int  # 0: a free one
    server_args: tuple[str, ...]  # further ones, which win

    def __post_init__(self) -> None:
        values = {"method": self.method, "budget": self.budget}
        KVCompressionConfig.parse(values, "--{}".format)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One option per setting."""
        add = parser.add_argument
        add("--model-path", required=True, help="folder or Hugging Face model id")
        add("--text-dir", type=Path, help="take the texts from its .txt files (Python's own help)")
        add(
            "--method",
            choices=METHOD_CHOICES[1:],
            default="lava_span",
            help="what to keep (%(default)s)",
        )
        add("--budget", type=float, default=0.125, help="part of the prompt to keep (%(default)s)")
        add("--requests", type=int, default=12, help="prompts sent at once (%(default)s)")
        add("--prompt-tokens", type=int, default=2000, help="tokens of each prompt (%(default)s)")
        add("--max-new-tokens", type=int, default=64, help="longest answer in tokens (%(default)s)")
        add("--slots", type=int, default=4096, help="size of the KV pool in tokens (%(default)s)")
        add("--port", type=int, default=0, help="port of the server (a free one)")
        add("server_args", nargs="*", metavar="-- OPTION", help="further options of the server")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ComparisonSettings:
        """From what `add_arguments` has parsed; other attributes are ignored."""
        values = {field.name: getattr(arguments, field.name) for field in fields(cls)}
        return cls(**values | {"server_args": tuple(arguments.server_args)})

    @property
    def label(self) -> str:
        return f"{self.method} {self.budget:g}"


@dataclass(frozen=True)
class Comparison:
    """Both runs of the same prompts."""

    settings: ComparisonSettings
    compressed: ConcurrencyResult
    exact: ConcurrencyResult

    @property
    def ratio(self) -> float:
        """How many times as many requests decoded at once with compression."""
        return self.compressed.peak_decoding / max(self.exact.peak_decoding, 1)

    def as_json(self) -> dict[str, Any]:
        """Settings, machine, and per run the peaks, seconds and the spans of all requests."""
        settings = vars(self.settings)
        return {
            "settings": settings | {"text_dir": settings["text_dir"] and str(settings["text_dir"])},
            "machine": machine_line(),
            "ratio": self.ratio,
            "off": _as_json(self.exact),
            "on": _as_json(self.compressed),
        }


def server_options(settings: ComparisonSettings) -> list[str]:
    """The server's command line, the same for both runs."""
    options = {
        "--model-path": settings.model_path,
        "--kv-compression": settings.method,
        "--kv-compression-budget": f"{settings.budget:g}",
        "--max-total-tokens": settings.slots,
        "--chunked-prefill-size": CHUNKED_PREFILL_SIZE,
        # Used slots are published after every decode step, not every 15.
        "--load-snapshot-publish-interval": 1,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [*words, *machine_options(), *settings.server_args]


def load_prompts(settings: ComparisonSettings) -> list[Prompt]:
    """Takes seconds: imports transformers. Raises PassageError."""
    texts = text_files(settings.text_dir) if settings.text_dir else python_topics()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    return long_prompts(tokenizer, texts, settings.requests, settings.prompt_tokens)


def run_prompts(
    server: Server,
    settings: ComparisonSettings,
    prompts: list[Prompt],
    compress: bool,
    on_progress: Callable[[LoadProgress], None],
) -> ConcurrencyResult:
    """One of the two runs, from an empty radix tree. Raises LoadError."""
    server.flush_cache()
    return measure_concurrency(
        server.url,
        [prompt.input_ids for prompt in prompts],
        kv_compression=None if compress else OFF,
        max_new_tokens=settings.max_new_tokens,
        on_progress=on_progress,
    )


def _as_json(result: ConcurrencyResult) -> dict[str, Any]:
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
