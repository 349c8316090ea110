# SPDX-License-Identifier: Apache-2.0
"""What a method keeps of one prompt, as numbers of the host."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from lava_sglang.policy import Method, PromptView, score_prompt, select_entries


class KeptPrompt(NamedTuple):
    """L layers, H KV heads, I prompt tokens."""

    method: str
    prompt_len: int  # I
    window_size: int  # w: the last tokens, which every head keeps
    budget: int  # b: mean entries of a head, window included
    counts: list[list[int]]  # [L][H], entries that a head keeps, window included
    weights: list[float]  # [L], each layer's claim on the budget
    tokens: list[list[list[int]]]  # [L][H], prompt positions that a head keeps, ascending

    @property
    def layer_means(self) -> list[float]:
        """Mean entries of a head, layer by layer."""
        return [sum(heads) / len(heads) for heads in self.counts]


def kept_prompt(method: Method, prompt: PromptView, budget: int) -> KeptPrompt:
    """The choice of `lava_sglang.policy.keep`, which is the server's. budget: b."""
    scores = score_prompt(method, prompt)
    kept = select_entries(method, scores, prompt, budget)
    positions, offsets = kept.tape_tokens.tolist(), kept.offsets.tolist()
    columns = [positions[start:end] for start, end in pairwise(offsets)]
    heads = prompt.num_kv_heads
    return KeptPrompt(
        method=method.config.method,
        prompt_len=len(prompt.slots),
        window_size=prompt.window_size,
        budget=budget,
        counts=kept.counts.tolist(),
        weights=scores.layer_weights.tolist(),
        tokens=[columns[first : first + heads] for first in range(0, len(columns), heads)],
    )


def runs(positions: list[int]) -> list[range]:
    """Stretches of neighbours in ascending positions."""
    found: list[range] = []
    for position in positions:
        if found and position == found[-1].stop:
            found[-1] = range(found[-1].start, position + 1)
        else:
            found.append(range(position, position + 1))
    return found
