# SPDX-License-Identifier: Apache-2.0
"""The attention layers of a loaded model."""

from __future__ import annotations

from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn


def attention_layers(model: nn.Module) -> list[RadixAttention]:
    """SGLang's RadixAttention modules of a model, by layer."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    return sorted(layers, key=lambda layer: layer.layer_id)
