# SPDX-License-Identifier: Apache-2.0
"""LAVaSpan: the expected square of what an entry adds to the output, and the words that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.policy.method import Method


@dataclass(frozen=True)
class LAVaSpan(Method):
    """Root mean square of the window's attention times the L2 norm of the token's value.

    That is the size of what an entry adds to the head's output, in the mean square over the
    window: one query that needs an entry counts for more than many that glance at it. The answer
    to a question stands after the words that the question attends to, so an entry also lifts the
    `span` tokens after it, to `span_share` of its own score. A layer keeps its best entries
    whichever head they are in, every head at least a fifth of the mean, as AdaKV does; layers keep
    equally many. Entries compare as in LAVa, arXiv 2509.09754.
    """

    head_floor: ClassVar[float] = 0.2

    recency: ClassVar[float] = 8.0
    span: ClassVar[int] = 16
    span_share: ClassVar[float] = 0.3

    def score_options(self, num_queries: int, device: torch.device) -> ScoreOptions:
        places = torch.arange(num_queries, device=device)
        return ScoreOptions(
            query_weights=(places / self.recency).softmax(dim=0),
            root_mean_square=True,
            pool_width=1,
            span=self.span,
            span_share=self.span_share,
            group_reduce="mean",
            value_norm="token",
        )
