# SPDX-License-Identifier: Apache-2.0
"""When requests are compressed: at the end of their prefill, and when slots are short.

Not when its result is processed: with overlap scheduling the first decode step is scheduled
before that. Budgets are known on the host, so nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lava_sglang.attention.device_state import DeviceState
from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.compression_state import (
    Compressed,
    CompressionPlan,
    ExactForNow,
    Planned,
    SkipReason,
)
from lava_sglang.managers.compressor import Compressor
from lava_sglang.managers.demand import Demand
from lava_sglang.managers.request import LavaReq
from lava_sglang.metrics import CompressionStats
from lava_sglang.policy import method_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

DEFERRED_WINDOW_BYTES = 512 * 2**20
"""Queries held for requests that are exact until slots are short; past it, they do not wait."""


class KVCompressionCoordinator:
    """One per scheduler, made when that is built. model: of the scheduler's model runner.

    From its making on the tape's rows are reset where SGLang hands rows out.
    """

    def __init__(
        self,
        config: KVCompressionConfig,
        model: DeviceState,
        scheduler: Scheduler,
        stats: CompressionStats,
    ) -> None:
        self.config = config
        self.stats = stats
        self.num_full_layers = len(model.layers.full)
        self.capture = model.capture
        self.decode_queries = model.decode_queries
        self.compressor = Compressor(model, scheduler)
        self.demand = Demand(scheduler)
        rows = scheduler.tree_cache.req_to_token_pool
        rows.register_on_alloc_rows(self.compressor.reset_rows)

    def seconds(self) -> list[float]:
        """How long each compression and trim took that has ended since the last call."""
        return self.compressor.timer.take()

    @property
    def may_shrink(self) -> bool:
        """Whether a running request may hold more slots than it has to."""
        return self.config.has_ladder or self.config.trigger == "pressure"

    def begin_extend(self, batch: ScheduleBatch) -> None:
        """Before the launch: fix the plans, say which queries to stash."""
        batch_start = 0
        for req in batch.reqs:
            req.begin_prefill(self.num_full_layers)
            state = req.compression_state
            if isinstance(state, Planned) and state.window is not None:
                chunk = (req.prefix_len, req.extend_end)
                self.capture.add(state.window, batch_start, chunk, state.plan.prompt_len)
            batch_start += req.extend_len

    def end_extend(self, batch: ScheduleBatch) -> bool:
        """After the launch: compress what finished its prefill. Mutates the batch's lengths.

        Returns whether admission is worth asking again: slots were freed, or can be from now on.
        """
        self.capture.segments.clear()
        changed = []
        can_shrink = False
        for i, req in enumerate(batch.reqs):
            if req.extend_end < len(req.full_untruncated_fill_ids):
                continue  # a middle chunk
            state = req.compression_state
            if not isinstance(state, Planned):
                pass
            elif req.to_finish is not None:
                req.skip_compression(SkipReason.ABORTED)
            elif self._stays_exact(batch, state.plan):
                req.stay_exact_for_now()
                can_shrink = True
            else:
                budget = self._affordable(batch, state.plan)
                reason = self.compressor.compress(req, state, budget)
                if reason is None:
                    req.take_tape(budget)
                    changed.append(i)
                else:
                    req.skip_compression(reason)
            self.stats.count(req)
        if changed:
            _set_lengths(batch, changed)
        return bool(changed) or can_shrink

    def make_room(self, batch: ScheduleBatch, enough: Callable[[], bool]) -> bool:
        """Shrink the batch's decoding requests by a rung each, largest first, until `enough()`.

        Mutates the requests, the pool and the batch's lengths. Returns whether it is enough.
        """
        changed: set[int] = set()
        stuck: set[int] = set()  # until another one makes room for their first copies
        while not (done := enough()):
            i = max(
                (
                    i
                    for i in range(len(batch.reqs))
                    if i not in stuck and _can_shrink(batch.reqs[i])
                ),
                key=lambda i: batch.reqs[i].held_slots,
                default=None,
            )
            if i is None:
                break
            if self._shrink(batch.reqs[i]):
                changed.add(i)
                stuck.clear()
            else:
                stuck.add(i)
        if changed:
            _set_lengths(batch, changed)
        return done

    def before_decode(self, batch: ScheduleBatch) -> bool:
        """Shrink requests before SGLang retracts any. Mutates as `make_room`.

        Returns whether admission is worth asking again: slots were freed.
        """
        free = self.demand.free_slots()
        self._compress_tails(batch)
        if self.may_shrink:

            def enough() -> bool:
                needed = batch.new_tokens_required_next_decode() + self.copy_reserve(batch)
                return self.demand.free_slots() >= needed

            self.make_room(batch, enough)
        return self.demand.free_slots() > free

    def _compress_tails(self, batch: ScheduleBatch) -> None:
        interval, queries = self.config.decode_interval, self.decode_queries
        if interval is None or queries is None:
            return
        changed = []
        for i, req in enumerate(batch.reqs):
            state, tail_len = req.compression_state, req.tail_len
            if not isinstance(state, Compressed) or req.finished() or tail_len <= interval:
                continue
            if method_of(req.compression).needs_queries and self.compressor.compress_tail(
                req, state, queries
            ):
                req.take_answer(tail_len)
                changed.append(i)
        if changed:
            _set_lengths(batch, changed)

    def copy_reserve(self, batch: ScheduleBatch) -> int:
        """Slots to keep free for one first copy: an exact request cannot shrink in a full pool."""
        if not self.may_shrink:
            return 0
        return max(
            (
                req.first_copy_len(req.next_budget)
                for req in batch.reqs
                if _is_deferred(req) and req.next_budget is not None
            ),
            default=0,
        )

    def shrinkable_slots(self, batch: ScheduleBatch) -> int:
        """Slots that `make_room` frees at least if it goes on until nothing can shrink any more."""
        gained = 0
        copies = []
        for req in batch.reqs:
            plan = req.plan
            if plan is None or not _can_shrink(req):
                continue
            lowest = plan.rungs[-1]
            if req.compressed:
                gained += req.held_slots - lowest
            else:
                takes = req.first_copy_len(lowest)
                copies.append((takes, req.released_slots(self.demand.tree_cache) - takes))
        free = self.demand.free_slots()
        for takes, gains in sorted(copies):
            if gains > 0 and takes <= free + gained:
                gained += gains
        return gained

    def _shrink(self, req: LavaReq) -> bool:
        """One rung down. False where a first copy finds no room, or would free no slot."""
        state, rung = req.compression_state, req.next_budget
        if isinstance(state, Compressed) and rung is not None:
            self.compressor.trim(req, state, rung)
            req.shorten_tape(rung)
            self.stats.count_trim(state.budget - rung)
            return True
        if not isinstance(state, ExactForNow):
            return False
        budget = self._first_budget(req, state.plan)
        if budget is None or self.compressor.compress(req, state, budget) is not None:
            return False
        req.take_tape(budget)
        self.stats.count(req)
        return True

    def _first_budget(self, req: LavaReq, plan: CompressionPlan) -> int | None:
        """The highest rung that a first copy has room for and frees slots by."""
        limit = min(self.demand.free_slots(), req.released_slots(self.demand.tree_cache) - 1)
        return next((rung for rung in plan.rungs if req.first_copy_len(rung) <= limit), None)

    def _stays_exact(self, batch: ScheduleBatch, plan: CompressionPlan) -> bool:
        """Whether it need not be compressed yet, and its queries may be held until then."""
        if not plan.exact_first:
            return False
        windows = [r.window for r in (*self.demand.running(), *batch.reqs) if r.window is not None]
        if sum(window.nbytes for window in windows) > DEFERRED_WINDOW_BYTES:
            return False
        return self.demand.leaves_room(self.demand.free_slots() - plan.rungs[0], batch.reqs)

    def _affordable(self, batch: ScheduleBatch, plan: CompressionPlan) -> int:
        """The highest rung that leaves room for what runs and what waits, or the lowest."""
        free = self.demand.free_slots()
        for budget in plan.rungs[:-1]:
            if budget <= free and self.demand.leaves_room(
                free + plan.suffix_len - budget, batch.reqs
            ):
                return budget
        return plan.rungs[-1]


def _can_shrink(req: LavaReq) -> bool:
    return req.next_budget is not None and not req.finished()


def _is_deferred(req: LavaReq) -> bool:
    return isinstance(req.compression_state, ExactForNow) and not req.finished()


def _set_lengths(batch: ScheduleBatch, changed: Iterable[int]) -> None:
    """New length tensors: the in-flight forward holds the old ones."""
    seq_lens_cpu = batch.seq_lens_cpu.clone()
    for i in changed:
        seq_lens_cpu[i] = batch.reqs[i].kv.kv_committed_len
    batch.seq_lens_cpu = seq_lens_cpu
    batch.seq_lens = seq_lens_cpu.to(
        device=batch.seq_lens.device, dtype=batch.seq_lens.dtype, non_blocking=True
    )
    batch.seq_lens_sum = None
