# SPDX-License-Identifier: Apache-2.0
"""LAVa: one score that compares entries across the heads of a layer, budgets by its entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.kernels.layer_split import layer_entropy
from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.policy.method import Method


@dataclass(frozen=True)
class LAVa(Method):
    """Window attention, max-pooled, maximum over the group, times the head's value norm.

    The score bounds the loss in the layer's attention output, so a layer keeps its best entries
    whichever head they are in. A layer's share of the budget is the entropy of its scores.
    Source: arXiv 2509.09754.
    """

    def score_options(self, num_queries: int, device: torch.device) -> ScoreOptions:
        width = self.config.pool_width
        return ScoreOptions(pool_width=width, group_reduce="max", value_norm="head")

    def layer_weights(self, scores: torch.Tensor) -> torch.Tensor:
        return layer_entropy(scores)
