# SPDX-License-Identifier: Apache-2.0
"""Random models that see images, small enough to prefill in milliseconds, and images for them."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.unit.tiny_tokenizer import tiny_tokenizer

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""What stands in a prompt's text for an image."""
VOCABULARY = 288
_SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def write_tiny_qwen2_5_vl(path: Path) -> Path:
    """Saves it to `path`: three text layers of grouped heads with M-RoPE, two vision blocks."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL.values())})
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # SGLang pads each prompt to itself
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3]),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=[1],
            initializer_range=0.2,
        ),
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in _SPECIAL.items()},
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    ).save_pretrained(path)
    return path


def random_image(width: int, height: int, seed: int) -> Image.Image:
    """Of whole merged patches, 28 pixels a side, no processor resizes it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
