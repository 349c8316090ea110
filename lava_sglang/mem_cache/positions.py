# SPDX-License-Identifier: Apache-2.0
"""RoPE positions of requests whose row is shorter than their text."""

from __future__ import annotations

import torch


class PositionDeltas:
    """By row of `req_to_token`: tokens that compression removed, added to decode positions.

    A static int64 table indexed by `req_pool_idx`, so that a captured graph may read it; row 0 is
    SGLang's padding row and stays 0. All reads and writes are ordered on one stream, the one that
    runs the forward passes.
    """

    def __init__(self, num_rows: int, device: torch.device | str):
        self.table = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def reset(self, rows: torch.Tensor) -> None:
        """rows: int [n], rows that start a prefill. Mutates the table."""
        self.table[rows] = 0

    def set(self, row: int, delta: int) -> None:
        """Mutates the table; enqueues one fill, reads nothing back."""
        self.table[row : row + 1].fill_(delta)

    def shift(self, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """positions: int [n] of a decode batch, rows: its req_pool_indices. A new tensor."""
        return positions + self.table[rows].to(positions.dtype)
