# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step: from a model's and a chip's data sheets, or fitted to a measured server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self


class Chunk(NamedTuple):
    """What a prefill computes of one request, in tokens: `extend` after the first `prefix`."""

    prefix: int
    extend: int


class Costs(Protocol):
    """Seconds of what a server does, one thing at a time."""

    def prefill(self, chunks: Sequence[Chunk]) -> float: ...

    def decode(self, requests: int, slots: int) -> float:
        """One step of `requests` which together hold `slots`."""
        ...

    def compress(self, suffix: int, budget: int) -> float:
        """Of one request."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """A dense transformer with grouped-query attention and a gated MLP."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2

    @classmethod
    def read(cls, path: Path) -> Self:
        """A Hugging Face config.json."""
        config = json.loads(path.read_text())
        heads = config["num_attention_heads"]
        return cls(
            config.get("_name_or_path") or path.parent.name,
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
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

    def attention_flops(self, chunk: Chunk) -> float:
        """Causal: each new token meets the prefix and, on average, half of the others."""
        pairs = chunk.extend * (chunk.prefix + chunk.extend / 2)
        return 4.0 * self.layers * self.query_heads * self.head_dim * pairs


MODELS = {
    "llama-3-8b": ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": ModelShape("Llama-3-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    "qwen3-4b": ModelShape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936),
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

    The three efficiencies and the overhead are assumptions, not measurements.
    """

    model: ModelShape
    chip: Chip
    flops_efficiency: float = 0.5  # reached part of the chip's FLOP/s
    bandwidth_efficiency: float = 0.7
    # Of the part of decode that reads K and V: below 1 if our kernel reads slower than the stock's.
    kv_efficiency: float = 1.0
    overhead: float = 1e-3  # of a step: launches, sampling, scheduling

    def pool_slots(self, memory_fraction: float) -> int:
        """Slots of the KV pool where weights and KV share this part of the memory."""
        free = self.chip.memory * memory_fraction - self.model.weight_bytes
        return max(int(free / self.model.slot_bytes), 0)

    def prefill(self, chunks: Sequence[Chunk]) -> float:
        tokens = sum(chunk.extend for chunk in chunks)
        flops = 2.0 * self.model.parameters * tokens
        flops += sum(self.model.attention_flops(chunk) for chunk in chunks)
        return self.overhead + max(self._compute(flops), self._read(self.model.step_bytes))

    def decode(self, requests: int, slots: int) -> float:
        kv = slots * self.model.slot_bytes / self.kv_efficiency
        flops = 2.0 * self.model.parameters * requests
        flops += 4.0 * self.model.layers * self.model.query_heads * self.model.head_dim * slots
        return self.overhead + max(self._compute(flops), self._read(self.model.step_bytes + kv))

    def compress(self, suffix: int, budget: int) -> float:
        """Scores read K and V of the suffix once; the copy reads and writes the kept entries."""
        return self._read((suffix + 2 * budget) * self.model.slot_bytes)

    def _compute(self, flops: float) -> float:
        return flops / (self.chip.flops * self.flops_efficiency)

    def _read(self, num_bytes: float) -> float:
        return num_bytes / (self.chip.bandwidth * self.bandwidth_efficiency)


@dataclass(frozen=True)
class FittedCosts:
    """Straight lines through a server's measured times; see `calibration.py`."""

    prefill_token: float  # seconds
    decode_step: float
    decode_request: float
    decode_slot: float
    compress_token: float  # of the suffix

    def slower(self, factor: float) -> Self:
        """The same on a machine that takes `factor` times as long for everything."""
        return type(self)(*(factor * seconds for seconds in astuple(self)))

    def prefill(self, chunks: Sequence[Chunk]) -> float:
        return self.prefill_token * sum(chunk.extend for chunk in chunks)

    def decode(self, requests: int, slots: int) -> float:
        return self.decode_step + self.decode_request * requests + self.decode_slot * slots

    def compress(self, suffix: int, budget: int) -> float:
        return self.compress_token * suffix
