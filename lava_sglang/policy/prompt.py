# SPDX-License-Identifier: Apache-2.0
"""A prompt whose entries are to be kept or dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.layer_map import LayerMap


class PromptView(NamedTuple):
    """A finished prompt, as a method sees it. Shapes are per rank."""

    arena: torch.Tensor  # [num_layers, 2, slots, num_kv_heads, head_dim], keys after RoPE
    slots: torch.Tensor  # int64 [prompt_len], the slot of each token
    layers: LayerMap  # of the arena; the next two are of its full layers only
    queries: torch.Tensor | None  # [full layers, window queries, num_qo_heads, head_dim]
    scaling: torch.Tensor | None  # float32 [full layers], factor on the attention logits
    shared_prefix_len: int  # P: tokens that stay exact, no entry of theirs is scored
    window_size: int  # w: last tokens, always kept, no entry of theirs is scored
    logit_cap: float = 0.0  # as of `reference.capped_ref`

    @property
    def num_layers(self) -> int:
        return self.arena.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.arena.shape[3]

    @property
    def scored_len(self) -> int:
        """M, suffix tokens that compete for a place: those before the observation window."""
        return self.slots.shape[0] - self.shared_prefix_len - self.window_size
