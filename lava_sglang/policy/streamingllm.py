# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: keep the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.policy.method import Method
from lava_sglang.policy.prompt import PromptView


@dataclass(frozen=True)
class StreamingLLM(Method):
    """The first `sink_tokens` of the suffix, then the most recent. Source: arXiv 2309.17453."""

    def score(self, prompt: PromptView) -> torch.Tensor:
        recency = torch.arange(prompt.scored_len, dtype=torch.float32, device=prompt.slots.device)
        recency[: self.config.sink_tokens] = torch.inf
        return recency.expand(len(prompt.layers.full), prompt.num_kv_heads, -1)
