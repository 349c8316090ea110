# SPDX-License-Identifier: Apache-2.0
"""What the host knows of the tape, for an attention backend that plans its calls there.

The lengths of pieces are made on the device. `commit` starts a copy of a request's offsets to
pinned memory, behind the kernels that make them, and returns; who needs them waits for that copy
alone, and only once: at the first decode step after the compression.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostPieces:
    """A compressed request's budget b, and the offsets of its pieces. A new one at each commit."""

    def __init__(self, budget: int, offsets: torch.Tensor):
        self.budget = budget
        self._copied: torch.cuda.Event | None = None
        if offsets.is_cuda:
            self._offsets = torch.empty_like(offsets, device="cpu", pin_memory=True)
            self._offsets.copy_(offsets, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._offsets = offsets.clone()

    @property
    def offsets(self) -> torch.Tensor:
        """int32 [L * H + 1] on the host. Waits while the copy is under way."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._offsets


class HostTape:
    """The pieces of compressed requests by row of `req_to_token`."""

    def __init__(self) -> None:
        self._pieces: dict[int, HostPieces] = {}

    def reset(self, rows: Iterable[int]) -> None:
        """rows: those that were handed to new owners."""
        for row in rows:
            self._pieces.pop(row, None)

    def commit(self, row: int, budget: int, offsets: torch.Tensor) -> None:
        """offsets: int32 [L * H + 1], on any device."""
        self._pieces[row] = HostPieces(budget, offsets)

    def pieces(self, rows: Iterable[int]) -> list[HostPieces | None]:
        """Of each row, None where it is uncompressed. The same objects while nothing changes."""
        return [self._pieces.get(row) for row in rows]
