# SPDX-License-Identifier: Apache-2.0
"""A made-up finished prompt of an 8B model's shape, on the GPU."""

from __future__ import annotations

import torch

from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import PromptView

WINDOW = 32


def made_up_prompt(
    prompt_len: int = 3000,
    prefix_len: int = 200,
    *,
    layers: int = 4,
    heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    spare_slots: int = 3000,
    seed: int = 0,
    sliding: tuple[int, ...] = (),
    sliding_window: int = 0,
) -> PromptView:
    """Queries that look at some tokens much more than at others, in shuffled slots."""
    g = torch.Generator("cuda").manual_seed(seed)
    slots = prompt_len + spare_slots
    full = layers - len(sliding)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    return PromptView(
        arena=random(layers, 2, slots, heads, head_dim).to(dtype),
        slots=torch.randperm(slots, generator=g, device="cuda")[:prompt_len],
        layers=LayerMap(range(layers), sliding, sliding_window, "cuda"),
        queries=(2 * random(full, WINDOW, heads * group, head_dim)).to(dtype),
        scaling=torch.full((full,), head_dim**-0.5, device="cuda"),
        shared_prefix_len=prefix_len,
        window_size=WINDOW,
    )


def unused_slots(prompt: PromptView, count: int) -> torch.Tensor:
    """Slots of no token of the prompt, shuffled."""
    free = torch.ones(prompt.arena.shape[2], dtype=torch.bool, device="cuda")
    free[prompt.slots] = False
    slots = free.nonzero().flatten()
    g = torch.Generator("cuda").manual_seed(count)
    return slots[torch.randperm(len(slots), generator=g, device="cuda")[:count]]


def on_cpu(prompt: PromptView) -> PromptView:
    """The same entries on the CPU, in float32."""
    assert prompt.queries is not None and prompt.scaling is not None
    return prompt._replace(
        arena=prompt.arena.cpu().float(),
        slots=prompt.slots.cpu(),
        layers=LayerMap(
            range(prompt.num_layers), prompt.layers.sliding, prompt.layers.sliding_window
        ),
        queries=prompt.queries.cpu().float(),
        scaling=prompt.scaling.cpu(),
    )
