# SPDX-License-Identifier: Apache-2.0
"""The static tables of compressed requests, by row of `req_to_token`.

A compressed request owns b private slots, row[P : P + b]. Their entries, column after column, are
one tape of L * H * b places: place e is layer e // (H * b), head (e % (H * b)) // b, slot
row[P + e % b]. Head (l, h) reads the piece offsets[l * H + h] : offsets[l * H + h + 1]. With equal
budgets each piece is the head's own column, which is SGLang's own layout.
"""

from __future__ import annotations

import torch

from lava_sglang.mem_cache.host_tape import HostTape


class TapeTable:
    """Where each request's kept entries are, and how far its positions are shifted.

    Indexed by `req_pool_idx` at fixed addresses, so that a captured graph may read it; row 0 is
    SGLang's padding row and stays uncompressed. Reads and writes are ordered on one stream, the one
    that runs the forward passes.

    prefix_lens: int32 [rows], P. budgets: int32 [rows], b, 0 where uncompressed.
    offsets: int32 [rows, L * H + 1], first tape place of each (layer, head), then L * H * b.
    position_deltas: int64 [rows], tokens that compression removed: added to decode positions.
    host: what a backend that plans on the host reads; None if no backend does.
    """

    host: HostTape | None = None

    def __init__(
        self, num_rows: int, num_layers: int, num_kv_heads: int, device: torch.device | str
    ):
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.prefix_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.budgets = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.offsets = torch.zeros(
            num_rows, num_layers * num_kv_heads + 1, dtype=torch.int32, device=device
        )
        self.position_deltas = torch.zeros(num_rows, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        tables = (self.prefix_lens, self.budgets, self.offsets, self.position_deltas)
        return sum(table.nbytes for table in tables)

    def reset(self, rows: list[int]) -> None:
        """rows: those that were handed to new owners, who read them exactly. Mutates the tables.

        Their numbers go to the device from pinned memory: nothing waits for them.
        """
        index = torch.tensor(rows, dtype=torch.int64, pin_memory=self.budgets.is_cuda)
        index = index.to(self.budgets.device, non_blocking=True)
        for table in (self.budgets, self.prefix_lens, self.position_deltas):
            table.index_fill_(0, index, 0)
        if self.host is not None:
            self.host.reset(rows)

    def commit(
        self, row: int, prefix_len: int, budget: int, removed: int, offsets: torch.Tensor
    ) -> None:
        """Mutates the tables: row `row` is compressed. Enqueues fills, reads nothing back.

        removed: tokens, N - b. offsets: int32 [L * H + 1].
        """
        self.prefix_lens[row : row + 1].fill_(prefix_len)
        self.budgets[row : row + 1].fill_(budget)
        self.position_deltas[row : row + 1].fill_(removed)
        self.offsets[row] = offsets
        if self.host is not None:
            self.host.commit(row, budget, self.offsets[row])

    def shift(self, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """positions: int [n] of a decode batch, rows: its req_pool_indices. A new tensor."""
        return positions + self.position_deltas[rows].to(positions.dtype)

    def check_integrity(self, row: int) -> None:
        """Raises AssertionError if `row` breaks the tape's rule. Reads the device: tests only."""
        budget = int(self.budgets[row])
        offsets = self.offsets[row].long()
        if self.host is not None:
            (known,) = self.host.pieces([row])
            assert (known.budget if known else 0) == budget, f"row {row}: the host is behind"
            on_host = offsets.tolist() if known is None else known.offsets.tolist()
            assert on_host == offsets.tolist(), f"row {row}: the host has other offsets"
        if budget == 0:
            assert int(self.position_deltas[row]) == 0, f"row {row}: shifted but uncompressed"
            return
        total = self.num_layers * self.num_kv_heads * budget
        assert int(offsets[0]) == 0, f"row {row}: the tape starts at {int(offsets[0])}"
        assert bool((offsets.diff() >= 0).all()), f"row {row}: a head keeps fewer than 0 entries"
        assert int(offsets[-1]) == total, f"row {row}: {int(offsets[-1])} places, must be {total}"
