# SPDX-License-Identifier: Apache-2.0
"""The scheduler's loop over counts: real decisions, modelled time.

Real: SGLang's `PrefillAdder` or our `LavaPrefillAdder`, `LavaReq`'s plans, our coordinator, which
decides who is compressed, trimmed and when, SGLang's estimate of the tokens to come and its order
of retraction. Written out again, from `Scheduler`'s `get_next_batch_to_run` and
`_get_new_batch_prefill_raw`: which of them is asked when. Not modelled: the overlap of scheduling
with the forward pass, which is as if scheduling took no time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.demand import Demand
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from simulator.compressor import BatchLengths, HeldQueries, SimulatedCompressor
from simulator.costs import Chunk, Costs
from simulator.memory import SlotPool, SlotTree
from simulator.outcome import Outcome
from simulator.request import SimulatedReq, StepClock
from simulator.trace import Arrival
from simulator.waiting import WaitingQueue

INPUT_MARGIN = 5  # of Scheduler.max_req_input_len


@dataclass(frozen=True)
class ServerShape:
    """Settings of the simulated server; the defaults are SGLang's on a large GPU."""

    slots: int
    chunked_prefill_size: int | None = 8192
    max_prefill_tokens: int = 16_384
    max_running_requests: int = 4096
    ignore_eos: bool = False  # requests say that they will generate all that they ask for
    window_bytes: int = 0  # queries of one request that stays exact until slots are short


class SimulatedBatch:
    """What `PrefillAdder` and our coordinator read of a `ScheduleBatch`."""

    def __init__(self, reqs: Iterable[SimulatedReq] = ()) -> None:
        self.reqs = list(reqs)
        self.batch_is_full = False
        self.seq_lens: Any = BatchLengths()
        self.seq_lens_cpu: Any = BatchLengths()
        self.seq_lens_sum: int | None = None

    def batch_size(self) -> int:
        return len(self.reqs)

    def new_tokens_required_next_decode(self) -> int:
        return len(self.reqs)


class Simulation:
    """One server and one trace. config: None for stock SGLang.

    Has the attributes of SGLang's `Scheduler` that our coordinator reads.
    """

    def __init__(self, server: ServerShape, costs: Costs, config: KVCompressionConfig | None):
        self.server = server
        self.costs = costs
        self.config = config or KVCompressionConfig()
        self.tree_cache = SlotTree()
        self.pool = SlotPool(server.slots, self.tree_cache)
        self.clock = StepClock()
        self.new_token_ratio_tracker = NewTokenRatioTracker.from_config()
        self.running_batch = SimulatedBatch()
        self.waiting_queue = WaitingQueue(self._make)
        self.chunked_req: SimulatedReq | None = None
        self.compressor = SimulatedCompressor(self.pool, self.tree_cache, costs)
        self.coordinator = KVCompressionCoordinator(self.config)
        self.coordinator.compressor = self.compressor  # type: ignore[assignment]
        self.coordinator.demand = Demand(self)
        self.may_rewrite = self.coordinator.may_shrink  # what runs
        if self.config.decode_interval is not None:
            self.coordinator.decode_queries = object()  # type: ignore[assignment]
            self.may_rewrite = True
        self.adder_class: Any = PrefillAdder
        if config is not None:
            self.adder_class = partial(LavaPrefillAdder, coordinator=self.coordinator)
        self.finishes: list[tuple[int, int, SimulatedReq]] = []  # a heap by step
        self.slots_read = 0  # by a decode step
        self.now = 0.0
        self.count = 0
        self.outcome = Outcome(server.slots)

    def run(self, trace: Iterable[Arrival]) -> Outcome:
        """Until every request is answered or refused. Can be called once."""
        arrivals = iter(trace)
        coming = next(arrivals, None)
        while True:
            while coming is not None and coming.seconds <= self.now:
                self._receive(coming)
                coming = next(arrivals, None)
            admitted = self._admit()
            if admitted:
                self._prefill(admitted)
            elif self.running_batch.reqs:
                self._decode(math.inf if coming is None else coming.seconds)
            elif coming is not None:
                self.now = max(self.now, coming.seconds)
                self.new_token_ratio_tracker.reset()  # as an idle scheduler does
            elif not self.waiting_queue:
                break
        self.outcome.seconds = self.now
        self.outcome.count_compressions(self.coordinator.stats)
        return self.outcome

    def _receive(self, arrival: Arrival) -> None:
        """SGLang refuses a prompt that fills the pool, and asks for no more than fits behind it."""
        longest = self.server.slots - 1
        if arrival.prompt_tokens >= longest - INPUT_MARGIN:
            self.outcome.refused += 1
            return
        most = longest - arrival.prompt_tokens - 1
        if arrival.max_new_tokens > most:
            output = min(arrival.output_tokens, most)
            arrival = replace(arrival, output_tokens=output, max_new_tokens=most)
        self.waiting_queue.append(arrival)

    def _make(self, arrival: Arrival) -> SimulatedReq:
        self.count += 1
        req = SimulatedReq(self.count, arrival, self.config, self.clock)
        req.sampling_params.ignore_eos = self.server.ignore_eos
        return req

    def _admit(self) -> list[SimulatedReq]:
        """`_get_new_batch_prefill_raw`, first come, first served."""
        batch, waiting = self.running_batch, self.waiting_queue
        if not batch.reqs:
            batch.batch_is_full = False
        if (batch.batch_is_full or not waiting) and self.chunked_req is None:
            return []
        rows = self.server.max_running_requests - len(batch.reqs)
        if rows <= 0 and self.chunked_req is None:
            batch.batch_is_full = True
            return []
        adder = self.adder_class(
            page_size=1,
            tree_cache=self.tree_cache,
            token_to_kv_pool_allocator=self.pool,
            running_batch=batch,
            new_token_ratio=self.new_token_ratio_tracker.current,
            rem_input_tokens=self.server.max_prefill_tokens,
            rem_chunk_tokens=self.server.chunked_prefill_size,
            max_running_requests=self.server.max_running_requests,
            waiting_queue_len=len(waiting),
        )
        if self.chunked_req is not None:
            self.chunked_req.init_next_round_input()
            self.chunked_req = adder.add_chunked_req(self.chunked_req)
        while waiting and adder.budget_state() != AddReqResult.OTHER:
            if len(adder.can_run_list) >= rows:
                batch.batch_is_full = True
            if batch.batch_is_full:
                break
            req = waiting.first()
            req.init_next_round_input(self.tree_cache)
            verdict = adder.add_one_req(
                req, has_chunked_req=self.chunked_req is not None, truncation_align_size=None
            )
            if adder.can_run_list and adder.can_run_list[-1] is req:
                waiting.pop_first()
            if verdict != AddReqResult.CONTINUE:
                if verdict == AddReqResult.NO_TOKEN:
                    batch.batch_is_full = bool(adder.can_run_list or batch.reqs)
                break
        if adder.new_chunked_req is not None:
            assert self.chunked_req is None  # as SGLang
            self.chunked_req = adder.new_chunked_req
        admitted: list[SimulatedReq] = adder.can_run_list
        if not admitted and not batch.reqs and self.chunked_req is None and waiting:
            waiting.pop_first()  # SGLang would wait for ever
            self.outcome.refused += 1
        return admitted

    def _prefill(self, admitted: list[SimulatedReq]) -> None:
        chunks = []
        for req in admitted:
            self._begin_prefill(req)
            extend = req.extend_end - req.prefix_len
            if not self.pool.take(extend):
                raise AssertionError(f"admission promised {extend} slots that are not there")
            req.held += extend
            chunks.append(Chunk(req.prefix_len, extend))
        self.outcome.count_prefill(sum(chunk.extend for chunk in chunks), self._used())
        finished = [req for req in admitted if req is not self.chunked_req]
        for req in finished:
            self._give_prompt_to_tree(req)
        if self.coordinator.end_extend(SimulatedBatch(admitted)):
            self.running_batch.batch_is_full = False
        seconds = self.costs.prefill(chunks) + self._compression_seconds()
        self.now += seconds
        self.outcome.prefill_seconds += seconds
        for req in finished:
            self._start_decode(req)

    def _begin_prefill(self, req: SimulatedReq) -> None:
        """As the coordinator's `begin_extend`, without queries."""
        req.begin_prefill()
        if req.plan is not None and req.plan.exact_first:
            req.window = HeldQueries(self.server.window_bytes)  # type: ignore[assignment]

    def _give_prompt_to_tree(self, req: SimulatedReq) -> None:
        """As `checkpoint_kv_cache`: the request's lock covers all of it."""
        total = len(req.full_untruncated_fill_ids)
        shared = min(req.arrival.shared_tokens, total - 1)
        node, taken = self.tree_cache.insert(req.group, shared, req.number, total)
        lock = self.tree_cache.lock(node)
        self.tree_cache.unlock(req.lock)
        req.lock = lock
        self.pool.give_back(req.held - taken)  # what the tree held already
        req.held = 0

    def _start_decode(self, req: SimulatedReq) -> None:
        if req.to_finish is not None:
            self._leave(req)
            self.outcome.refused += 1
            return
        outputs = req.outputs
        outputs.before += 1
        if req.first_token is None:
            req.first_token = self.now
        left = req.arrival.output_tokens - outputs.before
        if left == 0:
            self._leave(req)
            self._answer(req)
            return
        outputs.join()
        req.finish_step = self.clock.steps + left
        heapq.heappush(self.finishes, (req.finish_step, req.number, req))
        self.running_batch.reqs.append(req)
        self.slots_read += req.length
        self.outcome.count_running(len(self.running_batch.reqs))

    def _decode(self, next_arrival: float) -> None:
        """Steps until something changes for admission."""
        batch = self.running_batch
        count = len(batch.reqs)
        while self.finishes[0][2].finish_step != self.finishes[0][0]:
            heapq.heappop(self.finishes)  # it was retracted meanwhile
        last = self.finishes[0][0]
        wakes = not (batch.batch_is_full or self.waiting_queue)
        begin, steps = self.now, 0
        while self.clock.steps < last:
            freed = False
            if self.may_rewrite:
                freed = self.coordinator.before_decode(batch)
                self.now += self._compression_seconds()
            if not self.pool.take(count):
                break
            self.clock.steps += 1
            steps += 1
            self.now += self.costs.decode(count, self.slots_read)
            self.slots_read += count
            self.new_token_ratio_tracker.decay_step()
            if freed:
                batch.batch_is_full = False
                break
            if wakes and self.now >= next_arrival:
                break
        self.outcome.count_decode(steps, count, self.now - begin, self._used())
        if self.clock.steps == last:
            self._finish()
        elif not self.pool.has(count):
            self._retract()

    def _finish(self) -> None:
        done = set()
        while self.finishes and self.finishes[0][0] <= self.clock.steps:
            step, _, req = heapq.heappop(self.finishes)
            if req.finish_step == step:
                done.add(req.number)
                self._stop_decode(req)
                self._answer(req)
        batch = self.running_batch
        batch.reqs = [req for req in batch.reqs if req.number not in done]
        batch.batch_is_full = False

    def _retract(self) -> None:
        """`ScheduleBatch.retract_decode`."""
        batch = self.running_batch
        reqs = batch.reqs
        order = ScheduleBatch._get_decode_retraction_order(reqs)
        while len(order) > 1:
            req = reqs[order.pop()]
            self._stop_decode(req)
            req.reset_for_retract()
            self.waiting_queue.append(req)
            self.outcome.retractions += 1
            if self.pool.has(len(order)):
                break
        if not self.pool.has(len(order)):
            self._stop_decode(reqs[order.pop()])
            self.outcome.refused += 1  # SGLang aborts it
        batch.reqs = [reqs[i] for i in order]
        batch.batch_is_full = False
        ratio = self.new_token_ratio_tracker
        ratio.current = ratio.estimate_new_token_ratio_after_retract(batch.reqs)

    def _stop_decode(self, req: SimulatedReq) -> None:
        self.slots_read -= req.length
        req.finish_step = -1
        self._leave(req)

    def _leave(self, req: SimulatedReq) -> None:
        """Give back everything that the request holds."""
        self.pool.give_back(req.held + req.tail_len)
        req.held = 0
        req.outputs.leave()
        self.tree_cache.unlock(req.lock)
        req.lock = None

    def _answer(self, req: SimulatedReq) -> None:
        assert req.first_token is not None
        self.outcome.answer(
            req.arrival.seconds, req.first_token, self.now, req.arrival.output_tokens
        )

    def _compression_seconds(self) -> float:
        """Of what the coordinator did since the last call; what a step reads changes with it."""
        seconds, self.compressor.seconds = self.compressor.seconds, 0.0
        self.slots_read += self.compressor.slots_read
        self.compressor.slots_read = 0
        return seconds

    def _used(self) -> int:
        return self.pool.size - self.pool.free - self.tree_cache.evictable
