# SPDX-License-Identifier: Apache-2.0
"""The three steps every method shares: score the entries, split the budget, select the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.layer_split import layer_split, uniform_weights
from lava_sglang.kernels.select import Selection, select
from lava_sglang.kernels.window_scores import window_scores

HEAD_FLOOR_UNITS = 1_000_000
"""A head floor is read in so many parts of the mean: whole numbers are alike on every device."""


class PromptView(NamedTuple):
    """A finished prompt, as a method sees it. Shapes are per rank."""

    arena: torch.Tensor  # [num_layers, 2, slots, num_kv_heads, head_dim], keys after RoPE
    slots: torch.Tensor  # int64 [prompt_len], the slot of each token
    queries: torch.Tensor | None  # [num_layers, window queries, num_qo_heads, head_dim]
    scaling: torch.Tensor | None  # float32 [num_layers], factor on the attention logits
    shared_prefix_len: int  # P: tokens that stay exact, no entry of theirs is scored
    window_size: int  # w: last tokens, always kept, no entry of theirs is scored

    @property
    def num_layers(self) -> int:
        return self.arena.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.arena.shape[3]

    @property
    def scored_len(self) -> int:
        """Suffix tokens that compete for a place: those before the observation window."""
        return self.slots.shape[0] - self.shared_prefix_len - self.window_size


@dataclass(frozen=True)
class Method(ABC):
    """How to keep entries. One method, one dataclass, one file; it overrides what it differs in."""

    config: KVCompressionConfig

    needs_queries: ClassVar[bool] = False
    """Whether `score` reads the window's queries; if not, none are stashed."""

    uniform_heads: ClassVar[bool] = True
    """Whether every head of a layer keeps equally many; if not, the layer's best are kept."""

    head_floor: ClassVar[float] = 0.0
    """Share of the layer's mean that every head keeps, where heads are not uniform and
    `config.head_floor` is not set."""

    @abstractmethod
    def score(self, prompt: PromptView) -> torch.Tensor:
        """Importance of the scored tokens, the suffix without its window.

        Returns float32 [num_layers, num_kv_heads, scored_len]; higher is kept first.
        """

    def window_score(
        self, prompt: PromptView, *, group_reduce: str, value_norm: bool
    ) -> torch.Tensor:
        """A score from the window's attention (`kernels/window_scores.py`), for `score`."""
        assert prompt.queries is not None and prompt.scaling is not None
        return window_scores(
            prompt.queries,
            prompt.arena,
            prompt.slots,
            prompt.shared_prefix_len,
            prompt.window_size,
            prompt.scaling,
            pool_width=self.config.pool_width,
            group_reduce=group_reduce,
            value_norm=value_norm,
        )

    def layer_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Each layer's claim on the budget, float32 [num_layers] in [0, 1]. Equal by default."""
        return uniform_weights(scores.shape[0], scores.device)


class Split(NamedTuple):
    """How many scored entries each layer keeps; where heads are uniform, each head."""

    scores: torch.Tensor  # float32 [rows, heads that share a count, scored_len]
    counts: torch.Tensor  # int64 [rows]
    head_floor: int | torch.Tensor  # scored entries that every head keeps at least, or of each row


def split_weights(method: Method, scores: torch.Tensor) -> torch.Tensor:
    """Each layer's claim on the budget as `keep` uses it, float32 [num_layers] in [0, 1]."""
    if method.config.uniform_layers:
        return uniform_weights(scores.shape[0], scores.device)
    return method.layer_weights(scores)


def split(method: Method, scores: torch.Tensor, mean: int) -> Split:
    """Divide L * H * mean scored entries over the layers, by the method and its settings.

    scores: float32 [num_layers, num_kv_heads, scored_len], contiguous. mean: b - w.
    """
    num_layers, num_kv_heads, scored_len = scores.shape
    weights = split_weights(method, scores)
    if method.uniform_heads or method.config.uniform_heads:
        # Each head is a layer of its own: a layer's entries are divided by its heads exactly.
        per_head = layer_split(weights, num_layers * mean, scored_len)
        counts = per_head.repeat_interleave(num_kv_heads)
        return Split(scores.view(num_layers * num_kv_heads, 1, scored_len), counts, 0)
    counts = layer_split(weights, num_layers * num_kv_heads * mean, num_kv_heads * scored_len)
    given = method.config.head_floor
    share = method.head_floor if given is None else given
    units = round(share * HEAD_FLOOR_UNITS)
    floor = counts * units // (HEAD_FLOOR_UNITS * num_kv_heads) if units else 0
    return Split(scores, counts, floor)


def keep(method: Method, prompt: PromptView, budget: int) -> Selection:
    """What each head keeps: the window, and the best of L * H * (b - w) scored entries.

    The settings `uniform_layers`, `uniform_heads` and `head_floor` replace the method's own rules.
    budget: b, window included. The kept entries of all layers and heads are L * H * b exactly.
    Reads nothing back to the host on a GPU. Source: LAVa, arXiv 2509.09754; docs of each method.
    """
    scores = method.score(prompt).contiguous()
    layers = split(method, scores, budget - prompt.window_size)
    return select_split(layers, prompt, budget)


def select_split(layers: Split, prompt: PromptView, budget: int) -> Selection:
    """The best entries of each layer, `layers.counts` of them, on the tape of `budget` slots."""
    first, window = prompt.shared_prefix_len, prompt.window_size
    kept = select(layers.scores, layers.counts, budget, first, window, layers.head_floor)
    return kept._replace(counts=kept.counts.view(prompt.num_layers, prompt.num_kv_heads))
