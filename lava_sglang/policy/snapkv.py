# SPDX-License-Identifier: Apache-2.0
"""SnapKV: keep what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.policy.method import Method


@dataclass(frozen=True)
class SnapKV(Method):
    """Mean attention of the observation window, max-pooled, mean over the query heads of a group.

    Source: arXiv 2404.14469. Pooling is the maximum over `pool_width` tokens, as in the authors'
    code for LAVa and AdaKV. Grouped-query heads are averaged after pooling; AdaKV's code averages
    them before, which differs only where heads of a group peak at different tokens.
    """

    def score_options(self, num_queries: int, device: torch.device) -> ScoreOptions:
        width = self.config.pool_width
        return ScoreOptions(pool_width=width, group_reduce="mean", value_norm="none")
