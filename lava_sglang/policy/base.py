# SPDX-License-Identifier: Apache-2.0
"""The two steps every method shares: score the suffix of each layer, select the best entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.reference import top_entries_ref


class LayerView(NamedTuple):
    """One layer of one finished prompt, as a method sees it. Shapes are per rank."""

    keys: torch.Tensor  # [prompt_len, num_kv_heads, head_dim], after RoPE
    queries: torch.Tensor | None  # [window queries, num_qo_heads, head_dim], after RoPE
    scaling: float  # factor on the attention logits
    shared_prefix_len: int  # P: tokens that stay exact, no entry of theirs is scored
    window_size: int  # w: last tokens, always kept, no entry of theirs is scored


@dataclass(frozen=True)
class Method(ABC):
    """A way to score entries. One method, one dataclass, one file."""

    config: KVCompressionConfig

    needs_queries: ClassVar[bool] = False
    """Whether `score` reads the window's queries; if not, none are stashed."""

    @abstractmethod
    def score(self, layer: LayerView) -> torch.Tensor:
        """Importance of the scored tokens, the suffix without its window.

        Returns float32 [num_kv_heads, suffix_len - window_size]; higher is kept first.
        """


def scored_len(layer: LayerView) -> int:
    """Suffix tokens that compete for a place: those before the observation window."""
    return layer.keys.shape[0] - layer.shared_prefix_len - layer.window_size


def select(method: Method, layers: Iterable[LayerView], budget: int) -> torch.Tensor:
    """The tokens each head keeps, equally many in every layer and head.

    budget: b, window included. Returns int64 [num_layers, num_kv_heads, budget], positions in
    the prompt, ascending: the budget - w best scored tokens and the w of the window.
    """
    kept = []
    for layer in layers:
        prompt_len, num_kv_heads, _ = layer.keys.shape
        best = top_entries_ref(method.score(layer), budget - layer.window_size)
        window = torch.arange(prompt_len - layer.window_size, prompt_len, device=best.device)
        kept.append(
            torch.cat([best + layer.shared_prefix_len, window.expand(num_kv_heads, -1)], dim=-1)
        )
    return torch.stack(kept)
