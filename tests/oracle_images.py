# SPDX-License-Identifier: Apache-2.0
"""Owns the oracle of prompts with images: positions and image tokens are transformers' own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.oracle import ATTENTION, Oracle, Pass


class ImageOracle(Oracle):
    """A directory of a model that sees images, on the CPU. Prompts of text alone are as before."""

    def load(self, model_dir: str | Path, dtype: torch.dtype) -> Any:
        self.processor = AutoProcessor.from_pretrained(model_dir)
        self.seen: dict[str, Tensor] | None = None
        return AutoModelForImageTextToText.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
            local_files_only=True,
        ).eval()

    @contextmanager
    def seeing(self, text: str, images: Sequence[Image]) -> Iterator[list[int]]:
        """The token ids of a prompt with a placeholder for each image, an id for each token that
        an image takes. In the block, forward passes are of that prompt and what follows it."""
        self.seen = self.processor(text=[text], images=list(images), return_tensors="pt")
        try:
            yield self.seen["input_ids"][0].tolist()
        finally:
            self.seen = None

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[int], position: int, oracle_pass: Pass, num_logits: int = 1
    ) -> Tensor:
        """As the oracle's of text; the first pass over a prompt with images is all of it."""
        if self.seen is None:
            return super().forward(tokens, position, oracle_pass, num_logits)
        inputs: dict[str, Any] = dict(self.seen)
        positions, shift = self._positions(inputs)
        inputs.pop("attention_mask", None)
        if position > 0:  # of the answer: text, as far from its token as the prompt's end is
            inputs = {"input_ids": torch.tensor([list(tokens)])}
            positions = torch.arange(position, position + len(tokens))[None] + shift
        output = self.model(
            **inputs,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=num_logits,
            oracle_pass=oracle_pass,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _positions(self, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Of the prompt's tokens, [3, 1, I] or [1, I], and what is added to the answer's."""
        prompt_len = inputs["input_ids"].shape[1]
        if not hasattr(self.model.model, "get_rope_index"):
            return torch.arange(prompt_len)[None], 0
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions, shifts = self.model.model.get_rope_index(**{n: inputs[n] for n in names})
        return positions, int(shifts)
