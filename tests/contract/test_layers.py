# SPDX-License-Identifier: Apache-2.0
"""Which attention layers a model has, where SGLang does not make them its modules."""

from types import SimpleNamespace
from typing import Any

from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from lava_sglang.attention.layers import attention_layers
from lava_sglang.integration import refusals


def radix_attention(layer_id: int, **changes: Any) -> RadixAttention:
    return RadixAttention(2, 16, 0.25, 1, layer_id, **changes)


def caller(layer_idx: int, scaling: float | None, config: Any) -> nn.Module:
    """What transformers' attention says of itself."""
    module = nn.Module()
    module.layer_idx, module.scaling, module.config = layer_idx, scaling, config
    return module


def transformers_model(*layers: RadixAttention) -> Any:
    """As SGLang's Transformers backend builds it, whose vision tower counts its own layers."""
    model: Any = nn.Module()
    model.text_config, vision_config = SimpleNamespace(), SimpleNamespace()
    model.text = nn.ModuleList(caller(i, 0.5 + i, model.text_config) for i in range(2))
    model.vision = nn.ModuleList(caller(i, 100.0, vision_config) for i in range(2))
    model.plain = caller(1, None, model.text_config)
    model.attention_instances = {layer.layer_id: layer for layer in layers}
    return model


def test_layers_beside_a_transformers_model_are_found_with_its_scales() -> None:
    model = transformers_model(radix_attention(1), radix_attention(0))
    found = attention_layers(model)
    assert [layer.layer_id for layer in found] == [0, 1]
    assert [layer.scaling for layer in found] == [0.5, 1.5]
    assert refusals.model_reasons(model) == []


def test_what_a_transformers_model_does_not_fit_is_refused() -> None:
    across = transformers_model(radix_attention(0), radix_attention(1, is_cross_attention=True))
    assert any("cross-attention" in reason for reason in refusals.model_reasons(across))


def test_a_model_of_sglang_has_its_own_modules() -> None:
    model = nn.ModuleList([radix_attention(1), radix_attention(0)])
    assert [layer.layer_id for layer in attention_layers(model)] == [0, 1]
    assert attention_layers(nn.Linear(2, 2)) == []
