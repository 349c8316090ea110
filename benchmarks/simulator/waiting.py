# SPDX-License-Identifier: Apache-2.0
"""The queue of a scheduler. What arrives becomes a request when someone first looks at it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from simulator.request import SimulatedReq
from simulator.trace import Arrival


class WaitingQueue:
    """First come, first served. A million arrivals that wait are small; their requests are not."""

    def __init__(self, make: Callable[[Arrival], SimulatedReq]):
        self.make = make
        self.seen: deque[SimulatedReq] = deque()  # in front of
        self.unseen: deque[Arrival | SimulatedReq] = deque()

    def append(self, arrival: Arrival | SimulatedReq) -> None:
        self.unseen.append(arrival)

    def first(self) -> SimulatedReq:
        return self.seen[0] if self.seen else self._see()

    def pop_first(self) -> None:
        """Of which `first` has been asked."""
        self.seen.popleft()

    def __len__(self) -> int:
        return len(self.seen) + len(self.unseen)

    def __iter__(self) -> Iterator[SimulatedReq]:
        yield from self.seen
        while self.unseen:
            yield self._see()

    def _see(self) -> SimulatedReq:
        found = self.unseen.popleft()
        self.seen.append(self.make(found) if isinstance(found, Arrival) else found)
        return self.seen[-1]
