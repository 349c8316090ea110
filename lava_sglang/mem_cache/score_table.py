# SPDX-License-Identifier: Apache-2.0
"""The scores of kept entries, beside the tape: what a trim to a lower rung chooses by."""

from __future__ import annotations

import torch

from lava_sglang.kernels.trim import SCORE_DTYPE
from lava_sglang.layer_map import LayerMap


class ScoreTable:
    """Two bytes an entry, in the slots' own places: SCORE_DTYPE [num_layers, slots, num_kv_heads].

    A tape place's score is where the tape's rule puts its entry. Entries of the observation window
    have an infinite one. `layer_weights`: float32 [rows, full layers], of the request's ranking.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        layers: LayerMap,
        num_kv_heads: int,
        device: torch.device | str,
    ):
        shape = (layers.num_layers, num_slots, num_kv_heads)
        self.scores = torch.zeros(shape, dtype=SCORE_DTYPE, device=device)
        self.layer_weights = torch.zeros(num_rows, len(layers.full), device=device)

    def write(self, slots: torch.Tensor, tape_scores: torch.Tensor) -> None:
        """slots: int64 [budget]. tape_scores: [num_layers * num_kv_heads * budget], tape order."""
        num_layers, _, num_kv_heads = self.scores.shape
        by_column = tape_scores.to(SCORE_DTYPE).view(num_layers, num_kv_heads, len(slots))
        self.scores[:, slots] = by_column.transpose(1, 2)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """SCORE_DTYPE [num_layers * num_kv_heads * budget], tape order."""
        return self.scores[:, slots].transpose(1, 2).flatten()
