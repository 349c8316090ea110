# SPDX-License-Identifier: Apache-2.0
"""What a method may differ in: how it scores, how it weighs layers, whether heads compete."""

from __future__ import annotations

import pkgutil
from abc import ABC
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.layer_split import uniform_weights
from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.kernels.window_scores import window_scores
from lava_sglang.methods import METHODS, MethodTraits
from lava_sglang.policy.prompt import PromptView


@dataclass(frozen=True)
class Method(ABC):
    """How to keep entries. One method, one dataclass, one file; it overrides what it differs in."""

    config: KVCompressionConfig

    head_floor: ClassVar[float] = 0.0
    """Share of the layer's mean that every head keeps, where heads compete and
    `config.head_floor` is not set."""

    @property
    def traits(self) -> MethodTraits:
        """Its line in the table of methods."""
        return METHODS[self.config.method]

    @property
    def needs_queries(self) -> bool:
        """Whether `score` reads the window's queries; if not, none are stashed."""
        return self.traits.needs_queries

    @property
    def heads_compete(self) -> bool:
        """Whether the best entries of a layer are kept whichever head they are in; if not, every
        head of a layer keeps equally many."""
        return self.traits.heads_compete and not self.config.uniform_heads

    def score_options(self, num_queries: int, device: torch.device) -> ScoreOptions:
        """How the window's attention becomes a score, for a method that needs queries.
        num_queries: of the window, the oldest first.
        """
        raise NotImplementedError(f"{type(self).__name__} scores by no queries")

    def score(self, prompt: PromptView) -> torch.Tensor:
        """Importance of the scored tokens, the suffix without its window.

        Returns float32 [full layers, num_kv_heads, scored_len]; higher is kept first.
        """
        assert prompt.queries is not None and prompt.scaling is not None
        return window_scores(
            prompt.queries,
            prompt.arena,
            prompt.slots,
            prompt.shared_prefix_len,
            prompt.window_size,
            prompt.scaling,
            self.score_options(prompt.queries.shape[1], prompt.slots.device),
            layers=prompt.layers.full_index,
            logit_cap=prompt.logit_cap,
        )

    def layer_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Each full layer's claim on the budget, float32 in [0, 1]. Equal by default."""
        return uniform_weights(scores.shape[0], scores.device)


def load_methods() -> None:
    """Import every method's file, so that none fails to when a request first names it."""
    for traits in METHODS.values():
        pkgutil.resolve_name(traits.path)


@cache
def method_of(config: KVCompressionConfig) -> Method:
    """The method that these settings name, with them. Imports its file at the first call."""
    method: Method = pkgutil.resolve_name(METHODS[config.method].path)(config)
    return method
