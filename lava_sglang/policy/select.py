# SPDX-License-Identifier: Apache-2.0
"""Step 3, select: the best entries of each layer, and whose they are."""

from __future__ import annotations

import torch

from lava_sglang.kernels.select import Selection, select
from lava_sglang.policy.method import Method
from lava_sglang.policy.prompt import PromptView
from lava_sglang.policy.score import PromptScores, score_prompt
from lava_sglang.policy.split import split_budget


def keep(method: Method, prompt: PromptView, budget: int) -> Selection:
    """What each head keeps of `prompt` at this budget: all three steps."""
    return select_entries(method, score_prompt(method, prompt), prompt, budget)


def select_entries(
    method: Method, scores: PromptScores, prompt: PromptView, budget: int
) -> Selection:
    """The window of every head, and the best of L * H * (b - w) scored entries.

    budget: b, window included. The kept entries of all layers and heads are L * H * b exactly.
    Reads nothing back to the host on a GPU.
    """
    num_layers, num_kv_heads, scored_len = scores.entries.shape
    counts, floor = split_budget(
        method,
        prompt.layers,
        scores.layer_weights,
        num_kv_heads,
        scored_len,
        prompt.window_size,
        budget,
    )
    kept = select(
        scores.entries.view(len(counts), -1, scored_len),
        counts,
        budget,
        prompt.shared_prefix_len,
        prompt.window_size,
        floor,
    )
    return kept._replace(counts=kept.counts.view(num_layers, num_kv_heads))


def tape_entries(kept: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry at each tape place: its column, layer * num_kv_heads + head, and its token.

    int64 [num_layers * num_kv_heads * budget] both.
    """
    columns = torch.arange(len(kept.offsets) - 1, device=kept.offsets.device)
    owner = columns.repeat_interleave(kept.counts.view(-1), output_size=len(kept.tape_tokens))
    return owner, kept.tape_tokens.long()


def tape_scores(prompt: PromptView, scores: PromptScores, kept: Selection) -> torch.Tensor:
    """The score of the entry at each tape place, infinite in the window.

    float32 [num_layers * num_kv_heads * budget].
    """
    owner, tokens = tape_entries(kept)
    scored, last = tokens - prompt.shared_prefix_len, prompt.scored_len - 1
    found = scores.entries.flatten(0, 1)[owner, scored.clamp(max=last)]
    return found.where(scored <= last, float("inf"))
