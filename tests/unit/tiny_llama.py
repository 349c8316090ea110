# SPDX-License-Identifier: Apache-2.0
"""Random models of text that prefill in milliseconds, and prompts for them."""

from pathlib import Path
from typing import Any

import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 256
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
SETTINGS: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=QUERY_HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=512,
    initializer_range=0.2,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)


def write_tiny_llama(path: Path, **changes: Any) -> Path:
    """Saves it to `path`: grouped heads, weights large enough that attention is not flat.
    changes: of its configuration."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SETTINGS | {"head_dim": HEAD_DIM} | changes)).save_pretrained(
        path
    )
    return path


def write_tiny_granite(path: Path, **changes: Any) -> Path:
    """The same of a model that scales the product of query and key by a number of its own."""
    torch.manual_seed(0)
    config = GraniteConfig(**SETTINGS | {"attention_multiplier": 0.6} | changes)
    GraniteForCausalLM(config).save_pretrained(path)
    return path


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(VOCABULARY, (count,), generator=generator).tolist()
    return tokens
