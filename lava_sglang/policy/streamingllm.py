# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: keep the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.policy.base import LayerView, Method, scored_len


@dataclass(frozen=True)
class StreamingLLM(Method):
    """The first `sink_tokens` of the suffix, then the most recent. Source: arXiv 2309.17453."""

    def score(self, layer: LayerView) -> torch.Tensor:
        recency = torch.arange(scored_len(layer), dtype=torch.float32, device=layer.keys.device)
        recency[: self.config.sink_tokens] = torch.inf
        return recency.expand(layer.keys.shape[1], -1)
