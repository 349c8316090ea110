# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang plan`: how many requests a budget lets decode at once, and what that may bring.

Arithmetic, not a measurement: slots are divided, and a step takes as long as its arithmetic or its
memory traffic by the chip's data sheet, whichever is longer, at an assumed efficiency.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from rich.console import Console
from rich.table import Table

from lava_sglang.config import KVCompressionConfig

if TYPE_CHECKING:
    from lava_sglang.layer_map import LayerMap


class PlanError(ValueError):
    """Options that no server can have. Names the option, its value and what it accepts."""


@dataclass(frozen=True)
class ModelShape:
    """A dense transformer with grouped-query attention and a gated MLP. Of its layers `sliding` see
    the last `sliding_window` tokens only."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2
    sliding: int = 0
    sliding_window: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """A Hugging Face config.json."""
        config = json.loads(path.read_text())
        name = config.get("_name_or_path") or path.parent.name
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        sliding = (config.get("layer_types") or []).count("sliding_attention")
        return cls(
            name,
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
            sliding=sliding,
            sliding_window=config["sliding_window"] if sliding else 0,
        )

    @property
    def parameters(self) -> int:
        """Weights that every token meets: the embedding is looked up, the head multiplied."""
        heads = self.query_heads + 2 * self.kv_heads + self.query_heads
        layer = self.hidden * heads * self.head_dim + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden

    @property
    def step_bytes(self) -> int:
        """Weights that a step reads."""
        return self.parameters * self.bytes_per_value

    @property
    def weight_bytes(self) -> int:
        """In memory, the embedding too."""
        return (self.parameters + self.vocab * self.hidden) * self.bytes_per_value

    @property
    def slot_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def layer_map(self) -> LayerMap:
        """Which layers slide does not matter here, only how many."""
        from lava_sglang.layer_map import LayerMap

        return LayerMap(range(self.layers), range(self.sliding), self.sliding_window)

    def attention_flops(self, pairs: float) -> float:
        """Of a query with a key, and of its weight with a value, for so many pairs."""
        return 4.0 * self.query_heads * self.head_dim * pairs

    def prefill_pairs(self, tokens: int) -> float:
        """Of a query and a key, in all layers. Causal: a token meets half of the others at most."""
        seen = min(self.sliding_window, tokens)
        whole = tokens * tokens / 2
        return (self.layers - self.sliding) * whole + self.sliding * seen * (tokens - seen / 2)

    def entries_read(self, prompt: int, kept: int, tail: float) -> float:
        """Entries of a KV head, in all layers, that a step reads of a request that holds `kept`
        slots for a prompt of so many tokens, and `tail` of its answer."""
        full, seen = self.layers - self.sliding, min(float(self.sliding_window), prompt + tail)
        of_prompt = self.layers * kept - self.sliding * min(self.sliding_window - 1, prompt)
        return min(full * prompt, of_prompt) + full * tail + self.sliding * seen


MODELS = {
    "llama-3-8b": ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": ModelShape("Llama-3-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    "qwen3-4b": ModelShape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936),
    "gemma-3-27b": ModelShape(
        "Gemma-3-27B", 62, 5376, 21504, 32, 16, 128, 262208, sliding=52, sliding_window=1024
    ),
    "olmo-3-32b": ModelShape(
        "OLMo-3-32B", 64, 5120, 27648, 40, 8, 128, 100278, sliding=48, sliding_window=4096
    ),
}


@dataclass(frozen=True)
class Chip:
    """Data sheet of an accelerator: dense bfloat16 FLOP/s, bytes/s and bytes of its memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float


CHIPS = {
    "h100": Chip("H100 SXM 80 GB", 989e12, 3.35e12, 80e9),
    "h200": Chip("H200 SXM 141 GB", 989e12, 4.8e12, 141e9),
    "a100": Chip("A100 SXM 80 GB", 312e12, 2.04e12, 80e9),
}


@dataclass(frozen=True)
class RooflineCosts:
    """A step takes as long as its arithmetic or its memory traffic, whichever is longer.

    The two efficiencies and the overhead are assumptions, not measurements.
    """

    model: ModelShape
    chip: Chip
    flops_efficiency: float = 0.5  # reached part of the chip's FLOP/s
    bandwidth_efficiency: float = 0.7
    overhead: float = 1e-3  # of a step: launches, sampling, scheduling

    def pool_slots(self, memory_fraction: float) -> int:
        """Slots of the KV pool where weights and KV share this part of the memory."""
        free = self.chip.memory * memory_fraction - self.model.weight_bytes
        return max(int(free / self.model.slot_bytes), 0)

    def prefill(self, tokens: int) -> float:
        """Seconds of one prompt."""
        flops = 2.0 * self.model.parameters * tokens
        flops += self.model.attention_flops(self.model.prefill_pairs(tokens))
        return self.overhead + max(self._compute(flops), self._read(self.model.step_bytes))

    def decode(self, requests: int, entries: float) -> float:
        """Seconds of one step of `requests` which together read `entries` of each KV head."""
        kv = entries * self.model.slot_bytes / self.model.layers
        flops = 2.0 * self.model.parameters * requests + self.model.attention_flops(entries)
        return self.overhead + max(self._compute(flops), self._read(self.model.step_bytes + kv))

    def compress(self, suffix: int, budget: int) -> float:
        """Seconds. Scores read K and V of the suffix in full layers; the copy reads and writes what
        is kept."""
        scored = suffix * (1 - self.model.sliding / self.model.layers)
        return self._read((scored + 2 * budget) * self.model.slot_bytes)

    def _compute(self, flops: float) -> float:
        return flops / (self.chip.flops * self.flops_efficiency)

    def _read(self, num_bytes: float) -> float:
        return num_bytes / (self.chip.bandwidth * self.bandwidth_efficiency)


class Forecast(NamedTuple):
    """A server that always has requests waiting, all of one length, that share nothing."""

    budget: float  # 1: not compressed
    kept_tokens: int  # slots of a prompt while its answer is generated
    at_once: int  # requests that decode at once
    step_seconds: float
    output_throughput: float  # tokens a second
    prefill_share: float  # part of the time, compression included


def forecast(
    costs: RooflineCosts, pool_slots: int, prompt_tokens: int, output_tokens: int, budget: float
) -> Forecast:
    """What a budget comes to. Raises PlanError if the pool holds no such request."""
    kept, model = prompt_tokens, costs.model
    if budget != 1:
        config = KVCompressionConfig.parse({"method": "lava", "budget": budget}, "--{}s".format)
        kept = next(iter(config.rungs(prompt_tokens, 1, model.layer_map)), prompt_tokens)
    if prompt_tokens + output_tokens > pool_slots:
        raise PlanError(
            f"--prompt-tokens={prompt_tokens} and --output-tokens={output_tokens}: accepts up to "
            f"{pool_slots:,} together, the slots of the pool"
        )
    at_once = pool_slots // (kept + output_tokens)
    read = at_once * model.entries_read(prompt_tokens, kept, output_tokens / 2)
    step = costs.decode(at_once, read)
    prefill = costs.prefill(prompt_tokens)
    if kept < prompt_tokens:
        prefill += costs.compress(prompt_tokens, kept)
    seconds = prefill + output_tokens * step / at_once  # of the server, for one request
    return Forecast(budget, kept, at_once, step, output_tokens / seconds, prefill / seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"config.json, or one of {', '.join(MODELS)}")
    add("--chip", choices=CHIPS, default="h100", help="(%(default)s)")
    add("--slots", type=int, help="of the KV pool (what the chip's memory holds)")
    add("--memory-fraction", type=float, default=0.85, help="for weights and KV (%(default)s)")
    add("--prompt-tokens", type=int, nargs="+", default=[2000, 8000, 32000], help="(%(default)s)")
    add("--output-tokens", type=int, default=512, help="of an answer (%(default)s)")
    add("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="(%(default)s)")
    add("--flops-efficiency", type=float, default=0.5, help="assumed (%(default)s)")
    add("--bandwidth-efficiency", type=float, default=0.7, help="assumed (%(default)s)")
    add("--overhead-ms", type=float, default=1.0, help="of a step, assumed (%(default)s)")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Print the forecasts of every prompt length and budget, beside no compression.

    Raises PlanError, KVCompressionError or OSError.
    """
    model = MODELS.get(arguments.model) or ModelShape.read(Path(arguments.model))
    chip = CHIPS[arguments.chip]
    costs = RooflineCosts(
        model,
        chip,
        arguments.flops_efficiency,
        arguments.bandwidth_efficiency,
        arguments.overhead_ms / 1e3,
    )
    slots = arguments.slots or costs.pool_slots(arguments.memory_fraction)
    if slots < 1:
        raise PlanError(
            f"--chip={arguments.chip}: the {model.weight_bytes / 1e9:.0f} GB of {model.name} leave "
            "no room for slots: accepts a chip with more memory, or --slots"
        )
    found = [
        [forecast(costs, slots, prompt, arguments.output_tokens, budget) for budget in budgets]
        for budgets in [[1.0, *(budget for budget in arguments.budgets if budget != 1)]]
        for prompt in arguments.prompt_tokens
    ]
    title = f"{model.name}, {chip.name}, {slots:,} slots, answers of {arguments.output_tokens:,}"
    console.print(_table(title, arguments.prompt_tokens, found))


def _table(title: str, prompts: Sequence[int], found: Sequence[Sequence[Forecast]]) -> Table:
    table = Table(
        title=title,
        caption="An estimate, not a measurement: steps at assumed efficiencies, a queue that never "
        "ends, requests of one length that share nothing.",
    )
    for heading in ("prompt", "budget", "kept", "at once", "ms a step", "tokens/s", "", "prefill"):
        table.add_column(heading, justify="right")
    for prompt, forecasts in zip(prompts, found, strict=True):
        exact = forecasts[0]
        for each in forecasts:
            table.add_row(
                f"{prompt:,}",
                "off" if each is exact else f"{each.budget:g}",
                f"{each.kept_tokens:,}",
                f"{each.at_once:,}",
                f"{each.step_seconds * 1e3:.0f}",
                f"{each.output_throughput:,.0f}",
                f"{each.output_throughput / exact.output_throughput:.2f}x",
                f"{each.prefill_share:.0%}",
                end_section=each is forecasts[-1],
            )
    return table
