# SPDX-License-Identifier: Apache-2.0
"""Random models of a few layers, of architectures whose real weights no test can have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 49_152  # the demo model's tokenizer's
SLIDING_WINDOW = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "sliding_window": SLIDING_WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
THREE_TO_ONE = ["sliding_attention"] * 3 + ["full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # A cap that bends most logits: with the real 50 a random model would not notice it.
    "gemma2": {
        "layer_types": ALTERNATING,
        "head_dim": 16,
        "attn_logit_softcapping": 2.0,
        "hidden_act": "gelu_pytorch_tanh",  # as published, and as SGLang reads it
    },
    "cohere2": {"layer_types": THREE_TO_ONE},
    "olmo3": {"layer_types": THREE_TO_ONE},
    "exaone4": {"layer_types": THREE_TO_ONE},
}


def write_tiny_model(architecture: str, directory: Path, tokenizer_from: Path) -> None:
    """float32 weights, larger than a training starts with: attention is then far from even."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **_COMMON | ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2:
                # Small embeddings: what attention adds then decides.
                weights.normal_(std=0.25 if "proj" in name else 0.1)
            elif "post_attention_layernorm" in name:
                weights.fill_(3.0)
    model.save_pretrained(directory)
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, directory)
