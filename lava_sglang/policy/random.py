# SPDX-License-Identifier: Apache-2.0
"""Random: the baseline that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.policy.base import LayerView, Method, scored_len


@dataclass(frozen=True)
class Random(Method):
    """Uniform scores from `seed`: the same tokens for the same prompt length, in every layer."""

    def score(self, layer: LayerView) -> torch.Tensor:
        device = layer.keys.device
        generator = torch.Generator(device).manual_seed(self.config.seed)
        shape = (layer.keys.shape[1], scored_len(layer))
        return torch.rand(shape, generator=generator, device=device)
