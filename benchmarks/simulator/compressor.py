# SPDX-License-Identifier: Apache-2.0
"""Compression and trims as changes of counts: stands in for `managers/compressor.py`."""

from __future__ import annotations

from typing import Any

from lava_sglang.managers.request import SkipReason
from simulator.costs import Costs
from simulator.memory import SlotPool, SlotTree
from simulator.request import SimulatedReq


class SimulatedCompressor:
    """What the coordinator calls where a server rewrites entries."""

    def __init__(self, pool: SlotPool, tree: SlotTree, costs: Costs):
        self.pool = pool
        self.tree = tree
        self.costs = costs
        self.seconds = 0.0  # not accounted for yet
        self.slots_read = 0  # change of what a decode step reads, not accounted for yet

    def compress(self, req: SimulatedReq, budget: int) -> bool:
        """The prompt is in the tree: it loses its lock, and the request gets slots of its own."""
        plan = req.plan
        assert plan is not None and not req.compressed
        if not self.pool.take(budget):
            req.skip_reason = SkipReason.NO_ROOM
            return False
        before = req.length
        kept = self.tree.root
        if plan.shared_prefix_len and req.lock.parent is not None:
            kept = req.lock.parent
        lock = self.tree.lock(kept)
        self.tree.unlock(req.lock)
        req.lock = lock
        req.held += budget
        req.budget = budget
        req.window = None
        self._count(req, before)
        self.seconds += self.costs.compress(plan.suffix_len, budget)
        return True

    def trim(self, req: SimulatedReq, budget: int) -> None:
        """Gives back the slots above `budget`."""
        assert req.budget is not None
        before, old = req.length, req.budget
        self.pool.give_back(old - budget)
        req.held -= old - budget
        req.budget = budget
        self._count(req, before)
        self.seconds += self.costs.compress(old, budget)

    def compress_tail(self, req: SimulatedReq, queries: Any) -> bool:
        """The tape and the answer behind it become a tape of the same budget, in other slots."""
        assert req.budget is not None
        if not self.pool.take(req.budget):
            return False
        before, tail = req.length, req.tail_len
        self.pool.give_back(req.budget + tail)
        req.answer_compressed += tail
        self._count(req, before)
        self.seconds += self.costs.compress(req.budget + tail, req.budget)
        return True

    def _count(self, req: SimulatedReq, before: int) -> None:
        if req.outputs.decoding:
            self.slots_read += req.length - before


class HeldQueries:
    """The window queries of a request that stays exact for now: their size counts, not they."""

    complete = True

    def __init__(self, nbytes: int):
        self.nbytes = nbytes


class BatchLengths:
    """The length tensor of a batch, which the coordinator writes and nobody here reads."""

    device = "cpu"
    dtype: Any = None

    def clone(self) -> BatchLengths:
        return self

    def to(self, **kwargs: Any) -> BatchLengths:
        return self

    def __setitem__(self, place: int, length: int) -> None:
        """Requests know their own lengths."""
