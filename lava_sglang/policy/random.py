# SPDX-License-Identifier: Apache-2.0
"""Random: the baseline that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.policy.method import Method
from lava_sglang.policy.prompt import PromptView


@dataclass(frozen=True)
class Random(Method):
    """Uniform scores from `seed`: the same choice for every prompt of one length."""

    def score(self, prompt: PromptView) -> torch.Tensor:
        device = prompt.slots.device
        generator = torch.Generator(device).manual_seed(self.config.seed)
        shape = (len(prompt.layers.full), prompt.num_kv_heads, prompt.scored_len)
        return torch.rand(shape, generator=generator, device=device)
