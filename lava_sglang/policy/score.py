# SPDX-License-Identifier: Apache-2.0
"""Step 1, score: how important each entry is, and how much each layer may claim."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lava_sglang.kernels.layer_split import uniform_weights
from lava_sglang.kernels.trim import SCORE_DTYPE
from lava_sglang.policy.method import Method
from lava_sglang.policy.prompt import PromptView
from lava_sglang.policy.sliding import with_sliding_scores


class PromptScores(NamedTuple):
    """What a method makes of a prompt: all that a selection at any budget needs."""

    entries: torch.Tensor  # float32 [num_layers, num_kv_heads, scored_len]
    layer_weights: torch.Tensor  # float32 [full layers] in [0, 1]


def score_prompt(method: Method, prompt: PromptView) -> PromptScores:
    """Score the prompt's entries and weigh its layers.

    With a ladder, in the two bytes that later trims have of a score: they then find the same order.
    """
    entries = method.score(prompt).contiguous()
    if method.config.uniform_layers:
        weights = uniform_weights(entries.shape[0], entries.device)
    else:
        weights = method.layer_weights(entries)
    if method.config.has_ladder:
        entries = entries.to(SCORE_DTYPE).float()
    return PromptScores(with_sliding_scores(prompt.layers, entries), weights)
