# SPDX-License-Identifier: Apache-2.0
"""When requests are compressed: at the end of their prefill, and when slots are short.

Not when its result is processed: with overlap scheduling the first decode step is scheduled
before that. Budgets are known on the host, so nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from lava_sglang.attention.layers import attention_layers
from lava_sglang.attention.window import DecodeQueries, WindowCapture, WindowQueries
from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.managers.compressor import Compressor
from lava_sglang.managers.demand import Demand
from lava_sglang.managers.request import CompressionPlan, LavaReq, SkipReason
from lava_sglang.mem_cache.memory_plan import DECODE_QUERY_BYTES
from lava_sglang.mem_cache.score_table import ScoreTable
from lava_sglang.mem_cache.tape import TapeTable
from lava_sglang.metrics import CompressionStats
from lava_sglang.policy import method_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

DEFERRED_WINDOW_BYTES = 512 * 2**20
"""Queries held for requests that are exact until slots are short; past it, they do not wait."""


class KVCompressionCoordinator:
    """One per scheduler. `attach_model` when SGLang builds its attention backend, before any graph
    is captured; `attach_scheduler` when all is built."""

    def __init__(self, config: KVCompressionConfig) -> None:
        self.config = config
        self.capture = WindowCapture()
        self.stats = CompressionStats()
        self.compressor: Compressor | None = None
        self.decode_queries: DecodeQueries | None = None

    @property
    def tape(self) -> TapeTable | None:
        return None if self.compressor is None else self.compressor.tape

    def attach_model(self, runner: Any) -> TapeTable:
        """runner: SGLang's ModelRunner with its pools. Makes the tables once."""
        if self.compressor is None:
            pool = runner.token_to_kv_pool
            num_rows = runner.req_to_token_pool.req_to_token.shape[0]
            shape = (pool.layer_num, pool.head_num, pool.device)
            scores = (
                ScoreTable(num_rows, pool.arena.shape[2], *shape)
                if self.config.has_ladder
                else None
            )
            self.compressor = Compressor(runner, TapeTable(num_rows, *shape), scores)
            if self.config.decode_interval is not None:
                self.decode_queries = self._decode_queries(runner, num_rows)
        return self.compressor.tape

    def _decode_queries(self, runner: Any, num_rows: int) -> DecodeQueries:
        """Raises KVCompressionError where they take too much of the device's memory."""
        layers = attention_layers(runner.model)
        heads, head_dim = layers[0].tp_q_head_num, layers[0].qk_head_dim
        dtype: torch.dtype = runner.model_config.dtype
        shape = (num_rows, len(layers), self.config.window_size, heads, head_dim)
        size = math.prod(shape) * dtype.itemsize
        if size > DECODE_QUERY_BYTES:
            raise KVCompressionError(
                [
                    f"--kv-compression-config decode_interval={self.config.decode_interval}: the "
                    f"last {self.config.window_size} queries of {num_rows} requests take "
                    f"{size / 2**30:.1f} GiB, accepts up to {DECODE_QUERY_BYTES / 2**30:.0f}: "
                    f"--max-running-requests {DECODE_QUERY_BYTES * (num_rows - 1) // size} or a "
                    "smaller window_size"
                ]
            )
        return DecodeQueries(*shape, dtype, runner.token_to_kv_pool.device)

    def attach_scheduler(self, scheduler: Any) -> None:
        assert self.compressor is not None
        self.compressor.attach_scheduler(scheduler)
        scheduler.tree_cache.req_to_token_pool.register_on_alloc_rows(self.compressor.reset_rows)
        self.demand = Demand(scheduler)

    def warm_up(self) -> None:
        """Compile and load the kernels of a compression, before the server is ready."""
        assert self.compressor is not None
        self.compressor.warm_up(self.config)

    def seconds(self) -> list[float]:
        """Of each compression and trim that has ended since the last call."""
        return [] if self.compressor is None else self.compressor.timer.take()

    @property
    def may_shrink(self) -> bool:
        """Whether a running request may hold more slots than it has to."""
        return self.config.has_ladder or self.config.trigger == "pressure"

    def begin_extend(self, batch: ScheduleBatch) -> None:
        """Before the launch: fix the plans, say which queries to stash."""
        assert self.compressor is not None
        batch_start = 0
        for req in batch.reqs:
            req.begin_prefill()
            if req.plan is not None and method_of(req.compression).needs_queries:
                if req.window is None:
                    num_layers = self.compressor.kv_pool.layer_num
                    req.window = WindowQueries(num_layers, req.compression.window_size)
                chunk = (req.prefix_len, req.extend_end)
                self.capture.add(req.window, batch_start, chunk, req.plan.prompt_len)
            batch_start += req.extend_len

    def end_extend(self, batch: ScheduleBatch) -> bool:
        """After the launch: compress what finished its prefill. Mutates the batch's lengths.

        Returns whether admission is worth asking again: slots were freed, or can be from now on.
        """
        assert self.compressor is not None
        self.capture.segments.clear()
        changed = []
        can_shrink = False
        for i, req in enumerate(batch.reqs):
            if req.extend_end < len(req.full_untruncated_fill_ids):
                continue  # a middle chunk
            if req.plan is not None and req.to_finish is not None:
                req.plan, req.skip_reason = None, SkipReason.ABORTED
            if req.plan is None:
                req.window = None
            elif self._stays_exact(batch, req, req.plan):
                req.skip_reason = SkipReason.NO_PRESSURE
                can_shrink = True
            else:
                if self.compressor.compress(req, self._affordable(batch, req.plan)):
                    changed.append(i)
                req.window = None
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
        interval = self.config.decode_interval
        if interval is None:
            return
        assert self.compressor is not None and self.decode_queries is not None
        changed = [
            i
            for i, req in enumerate(batch.reqs)
            if req.compressed
            and not req.finished()
            and req.tail_len > interval
            and method_of(req.compression).needs_queries
            and self.compressor.compress_tail(req, self.decode_queries)
        ]
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
            if not _can_shrink(req):
                continue
            lowest = req.plan.rungs[-1]
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
        assert self.compressor is not None
        before = req.held_slots
        if req.compressed:
            budget = req.next_budget
            assert budget is not None
            self.compressor.trim(req, budget)
            self.stats.count_trim(before - budget)
            return True
        budget = self._first_budget(req)
        if budget is None or not self.compressor.compress(req, budget):
            req.skip_reason = SkipReason.NO_PRESSURE
            return False
        req.skip_reason = None
        self.stats.count(req)
        return True

    def _first_budget(self, req: LavaReq) -> int | None:
        """The highest rung that a first copy has room for and frees slots by."""
        assert req.plan is not None
        limit = min(self.demand.free_slots(), req.released_slots(self.demand.tree_cache) - 1)
        return next((rung for rung in req.plan.rungs if req.first_copy_len(rung) <= limit), None)

    def _stays_exact(self, batch: ScheduleBatch, req: LavaReq, plan: CompressionPlan) -> bool:
        """Whether it need not be compressed yet, and its queries may be held until then."""
        if not plan.exact_first:
            return False
        windows = [r.window for r in (*self.demand.running(), *batch.reqs) if r.window is not None]
        if sum(window.nbytes for window in windows) > DEFERRED_WINDOW_BYTES:
            return False
        return self.demand.spare(self.demand.free_slots() - plan.rungs[0], batch.reqs)

    def _affordable(self, batch: ScheduleBatch, plan: CompressionPlan) -> int:
        """The highest rung that leaves room for what runs and what waits, or the lowest."""
        free = self.demand.free_slots()
        for budget in plan.rungs[:-1]:
            if budget <= free and self.demand.spare(free + plan.suffix_len - budget, batch.reqs):
                return budget
        return plan.rungs[-1]


def _can_shrink(req: LavaReq) -> bool:
    return req.next_budget is not None and not req.finished()


def _is_deferred(req: LavaReq) -> bool:
    return not req.compressed and _can_shrink(req)


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
