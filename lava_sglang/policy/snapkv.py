# SPDX-License-Identifier: Apache-2.0
"""SnapKV: keep what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lava_sglang.kernels.reference import max_pool_ref, window_attention_ref
from lava_sglang.policy.base import LayerView, Method, scored_len


@dataclass(frozen=True)
class SnapKV(Method):
    """Mean attention of the observation window, max-pooled, mean over the query heads of a group.

    Source: arXiv 2404.14469. Pooling is the maximum over `pool_width` tokens, as in the authors'
    code for LAVa and AdaKV; grouped-query heads are averaged after pooling, as in AdaKV's.
    """

    needs_queries: ClassVar[bool] = True

    def score(self, layer: LayerView) -> torch.Tensor:
        assert layer.queries is not None
        num_kv_heads = layer.keys.shape[1]
        first, count = layer.shared_prefix_len, scored_len(layer)
        attention = window_attention_ref(layer.queries, layer.keys, layer.scaling)
        pooled = max_pool_ref(attention[:, first : first + count], self.config.pool_width)
        return pooled.view(num_kv_heads, -1, count).mean(dim=1)
