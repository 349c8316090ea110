# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: SnapKV's scores, more entries for the lower layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lava_sglang.kernels.layer_split import pyramid_weights
from lava_sglang.policy.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """A layer's share falls linearly from the first to the last, which gets a twentieth of the
    mean. Source: arXiv 2406.02069."""

    def layer_weights(self, scores: torch.Tensor) -> torch.Tensor:
        return pyramid_weights(scores.shape[0], scores.device)
