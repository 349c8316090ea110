# SPDX-License-Identifier: Apache-2.0
"""The scores of kept entries, beside the tape: what a trim to a lower rung chooses by."""

from __future__ import annotations

import torch

from lava_sglang.policy.base import SCORE_DTYPE, PromptView, Ranking, Selection


class ScoreTable:
    """Two bytes an entry, in the slots' own places: SCORE_DTYPE [num_layers, slots, num_kv_heads].

    A tape place's score is where the tape's rule puts its entry. Entries of the observation window
    have an infinite one. `layer_weights`: float32 [rows, num_layers], of the request's ranking.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        device: torch.device | str,
    ):
        shape = (num_layers, num_slots, num_kv_heads)
        self.scores = torch.zeros(shape, dtype=SCORE_DTYPE, device=device)
        self.layer_weights = torch.zeros(num_rows, num_layers, device=device)

    def store(
        self,
        row: int,
        slots: torch.Tensor,
        prompt: PromptView,
        ranking: Ranking,
        kept: Selection,
    ) -> None:
        """Keep what a compression chose by. Mutates the tables.

        slots: int64 [budget], of the tape.
        """
        columns = len(kept.offsets) - 1
        owner = torch.arange(columns, device=slots.device).repeat_interleave(
            kept.counts.view(-1), output_size=len(kept.tape_tokens)
        )
        token = kept.tape_tokens.long() - prompt.shared_prefix_len
        last = prompt.scored_len - 1
        scores = ranking.scores.view(columns, -1)[owner, token.clamp(max=last)]
        self.write(slots, scores.where(token <= last, float("inf")))
        self.layer_weights[row] = ranking.layer_weights

    def write(self, slots: torch.Tensor, tape_scores: torch.Tensor) -> None:
        """slots: int64 [budget]. tape_scores: [num_layers * num_kv_heads * budget], tape order."""
        num_layers, _, num_kv_heads = self.scores.shape
        by_column = tape_scores.to(SCORE_DTYPE).view(num_layers, num_kv_heads, len(slots))
        self.scores[:, slots] = by_column.transpose(1, 2)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """SCORE_DTYPE [num_layers * num_kv_heads * budget], tape order."""
        return self.scores[:, slots].transpose(1, 2).flatten()
