# SPDX-License-Identifier: Apache-2.0
"""The attention layers of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from lava_sglang.config import refuse
from lava_sglang.layer_map import LayerMap


def attention_layers(model: nn.Module) -> list[RadixAttention]:
    """SGLang's RadixAttention modules of a model, by layer."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    layers += _beside_transformers(model)
    return sorted(layers, key=lambda layer: layer.layer_id)


def layer_map(layers: Sequence[RadixAttention], device: torch.device | str) -> LayerMap:
    """The arena's layers of a model with these attention layers. Raises KVCompressionError."""
    refuse(sliding_reasons(layers))
    sliding = [i for i, layer in enumerate(layers) if sliding_window_of(layer)]
    window = max(map(sliding_window_of, layers), default=0)
    return LayerMap([layer.layer_id for layer in layers], sliding, window, device)


def sliding_window_of(layer: RadixAttention) -> int:
    """Tokens that the layer attends to, its own included; 0: all. SGLang counts those before."""
    before = layer.sliding_window_size
    return 0 if before is None or before < 0 else before + 1


def sliding_reasons(layers: Sequence[RadixAttention]) -> list[str]:
    """What keeps a model's sliding windows from being served, one sentence each."""
    windows = {sliding_window_of(layer) for layer in layers}
    if windows and 0 not in windows:
        return ["models whose layers all have a sliding window are not supported: nothing grows"]
    if len(windows) > 2:
        return [f"models with several sliding windows ({sorted(windows - {0})}) are not supported"]
    return []


def _beside_transformers(model: nn.Module) -> list[RadixAttention]:
    """Those of SGLang's Transformers backend, which holds them in a plain dict, by layer.

    Each is given the scale of the module that calls it, as that does in its first pass. Mutates
    them. Source: models/transformers.py (SGLang 0.5.23).
    """
    instances: dict[int, RadixAttention] = getattr(model, "attention_instances", {})
    text_config = getattr(model, "text_config", None)
    for module in model.modules() if instances else ():
        index, scaling = getattr(module, "layer_idx", None), getattr(module, "scaling", None)
        if index in instances and scaling is not None and module.config is text_config:
            instances[index].scaling = float(scaling)
    return list(instances.values())
