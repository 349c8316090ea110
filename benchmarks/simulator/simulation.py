# SPDX-License-Identifier: Apache-2.0
"""The scheduler's loop over counts: real admission and retraction order, modelled time.

Real: SGLang's `PrefillAdder` or our `LavaPrefillAdder`, `LavaReq`'s plans, SGLang's estimate of the
tokens to come and its order of retraction. Written out again, from `Scheduler`'s
`get_next_batch_to_run` and `_get_new_batch_prefill_raw`: which of them is asked when. Not modelled:
the overlap of scheduling with the forward pass, which is as if scheduling took no time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from lava_sglang.managers.request import SkipReason
from simulator.costs import Chunk, Costs
from simulator.memory import SlotPool, SlotTree
from simulator.outcome import Outcome
from simulator.request import SimulatedReq, StepClock
from simulator.trace import Arrival

INPUT_MARGIN = 5  # of Scheduler.max_req_input_len


@dataclass(frozen=True)
class ServerShape:
    """Settings of the simulated server; the defaults are SGLang's on a large GPU."""

    slots: int
    chunked_prefill_size: int | None = 8192
    max_prefill_tokens: int = 16_384
    max_running_requests: int = 4096
    ignore_eos: bool = False  # requests say that they will generate all that they ask for


class RunningBatch:
    """What `PrefillAdder` reads of the batch that decodes."""

    def __init__(self) -> None:
        self.reqs: list[SimulatedReq] = []
        self.batch_is_full = False

    def batch_size(self) -> int:
        return len(self.reqs)


class Simulation:
    """One server and one trace. config: None for stock SGLang."""

    def __init__(self, server: ServerShape, costs: Costs, config: KVCompressionConfig | None):
        self.server = server
        self.costs = costs
        self.config = config or KVCompressionConfig(method="none")
        self.adder_class = PrefillAdder if config is None else LavaPrefillAdder
        self.tree = SlotTree()
        self.pool = SlotPool(server.slots, self.tree)
        self.clock = StepClock()
        self.ratio = NewTokenRatioTracker.from_config()
        self.batch = RunningBatch()
        self.waiting: deque[Arrival | SimulatedReq] = deque()
        self.chunked: SimulatedReq | None = None
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
            elif self.batch.reqs:
                self._decode(math.inf if coming is None else coming.seconds)
            elif coming is not None:
                self.now = max(self.now, coming.seconds)
                self.ratio.reset()  # as an idle scheduler does
            else:
                break
        assert not self.waiting and self.chunked is None
        self.outcome.seconds = self.now
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
        self.waiting.append(arrival)

    def _admit(self) -> list[SimulatedReq]:
        """`_get_new_batch_prefill_raw`, first come, first served."""
        batch = self.batch
        if not batch.reqs:
            batch.batch_is_full = False
        if (batch.batch_is_full or not self.waiting) and self.chunked is None:
            return []
        rows = self.server.max_running_requests - len(batch.reqs)
        if rows <= 0 and self.chunked is None:
            batch.batch_is_full = True
            return []
        adder = self.adder_class(
            page_size=1,
            tree_cache=self.tree,
            token_to_kv_pool_allocator=self.pool,
            running_batch=batch,
            new_token_ratio=self.ratio.current,
            rem_input_tokens=self.server.max_prefill_tokens,
            rem_chunk_tokens=self.server.chunked_prefill_size,
            max_running_requests=self.server.max_running_requests,
            waiting_queue_len=len(self.waiting),
        )
        if self.chunked is not None:
            self.chunked.next_chunk()
            self.chunked = adder.add_chunked_req(self.chunked)
        while self.waiting and adder.budget_state() != AddReqResult.OTHER:
            if len(adder.can_run_list) >= rows:
                batch.batch_is_full = True
            if batch.batch_is_full:
                break
            req = self._head()
            req.match(self.tree)
            verdict = adder.add_one_req(
                req, has_chunked_req=self.chunked is not None, truncation_align_size=None
            )
            if adder.can_run_list and adder.can_run_list[-1] is req:
                self.waiting.popleft()
            if verdict != AddReqResult.CONTINUE:
                if verdict == AddReqResult.NO_TOKEN:
                    batch.batch_is_full = bool(adder.can_run_list or batch.reqs)
                break
        if adder.new_chunked_req is not None:
            self.chunked = adder.new_chunked_req
        admitted: list[SimulatedReq] = adder.can_run_list
        if not admitted and not batch.reqs and self.waiting:
            # SGLang would wait for ever.
            self.waiting.popleft()
            self.outcome.refused += 1
        return admitted

    def _head(self) -> SimulatedReq:
        """The first of the queue, made into a request when it gets there."""
        first = self.waiting[0]
        if isinstance(first, Arrival):
            self.count += 1
            first = SimulatedReq(self.count, first, self.config, self.clock)
            first.sampling_params.ignore_eos = self.server.ignore_eos
            self.waiting[0] = first
        return first

    def _prefill(self, admitted: list[SimulatedReq]) -> None:
        chunks = []
        for req in admitted:
            req.begin_prefill()
            extend = req.extend_end - req.prefix_len
            if not self.pool.take(extend):
                raise AssertionError(f"admission promised {extend} slots that are not there")
            req.held += extend
            chunks.append(Chunk(req.prefix_len, extend))
        seconds = self.costs.prefill(chunks)
        self.outcome.count_prefill(sum(chunk.extend for chunk in chunks), self._used())
        finished = [req for req in admitted if req is not self.chunked]
        for req in finished:
            seconds += self._finish_prefill(req)
        self.now += seconds
        self.outcome.prefill_seconds += seconds
        for req in finished:
            self._start_decode(req)

    def _finish_prefill(self, req: SimulatedReq) -> float:
        """Give the prompt to the tree and compress it; returns the seconds of the compression."""
        plan = req.plan
        copied = plan is not None and self.pool.take(plan.budget)
        if plan is not None and not copied:
            req.skip_reason = SkipReason.NO_ROOM
        arrival = req.arrival
        group = ("group", arrival.group)
        total = arrival.prompt_tokens + len(req.outputs)
        node, taken = self.tree.insert(group, arrival.shared_tokens, req.number, total)
        keep = node
        if copied and plan is not None:
            keep = node.parent if plan.shared_prefix_len and node.parent else self.tree.root
        lock = self.tree.lock(keep)
        self.tree.unlock(req.lock)
        req.lock = lock
        self.pool.give_back(req.held - taken)  # what the tree held already
        req.held = 0
        if not copied or plan is None:
            return 0.0
        req.held = plan.budget
        req.compressed = True
        self.batch.batch_is_full = False
        self.outcome.compressed += 1
        return self.costs.compress(plan.suffix_len, plan.budget)

    def _start_decode(self, req: SimulatedReq) -> None:
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
        self.batch.reqs.append(req)
        self.slots_read += self._length(req)
        self.outcome.count_running(len(self.batch.reqs))

    def _decode(self, next_arrival: float) -> None:
        """Steps until something changes for admission."""
        count = len(self.batch.reqs)
        while self.finishes[0][2].finish_step != self.finishes[0][0]:
            heapq.heappop(self.finishes)  # it was retracted meanwhile
        last = self.finishes[0][0]
        wakes = not (self.batch.batch_is_full or self.waiting)
        begin, steps = self.now, 0
        while self.clock.steps < last and self.pool.take(count):
            self.clock.steps += 1
            steps += 1
            self.now += self.costs.decode(count, self.slots_read)
            self.slots_read += count
            self.ratio.decay_step()
            if wakes and self.now >= next_arrival:
                break
        self.outcome.count_decode(steps, count, self.now - begin, self._used())
        if self.clock.steps == last:
            self._finish()
        elif not self.pool.available_size() + self.tree.evictable >= count:
            self._retract()

    def _finish(self) -> None:
        done = set()
        while self.finishes and self.finishes[0][0] <= self.clock.steps:
            step, _, req = heapq.heappop(self.finishes)
            if req.finish_step == step:
                done.add(req.number)
                self.slots_read -= self._length(req)
                self._leave(req)
                self._answer(req)
        self.batch.reqs = [req for req in self.batch.reqs if req.number not in done]
        self.batch.batch_is_full = False

    def _retract(self) -> None:
        """`ScheduleBatch.retract_decode`."""
        reqs = self.batch.reqs
        order = ScheduleBatch._get_decode_retraction_order(reqs)
        while len(order) > 1:
            req = reqs[order.pop()]
            self.slots_read -= self._length(req)
            req.finish_step = -1
            self._leave(req)
            req.reset_for_retract()
            self.waiting.append(req)
            self.outcome.retractions += 1
            if self.pool.available_size() + self.tree.evictable >= len(order):
                break
        self.batch.reqs = [reqs[i] for i in order]
        self.batch.batch_is_full = False
        self.ratio.current = self.ratio.estimate_new_token_ratio_after_retract(self.batch.reqs)
        if self.pool.available_size() + self.tree.evictable < len(order):
            (req,) = self.batch.reqs
            self.slots_read -= self._length(req)
            req.finish_step = -1
            self._leave(req)
            self.batch.reqs = []
            self.outcome.refused += 1  # SGLang aborts it

    def _leave(self, req: SimulatedReq) -> None:
        """Give back everything that the request holds."""
        self.pool.give_back(req.held + req.outputs.steps)
        req.held = 0
        req.outputs.leave()
        self.tree.unlock(req.lock)
        req.lock = None

    def _answer(self, req: SimulatedReq) -> None:
        assert req.first_token is not None
        self.outcome.answer(
            req.arrival.seconds, req.first_token, self.now, req.arrival.output_tokens
        )

    def _length(self, req: SimulatedReq) -> int:
        """Slots that a decode step reads of it."""
        return req.lock.depth + req.held + req.outputs.steps

    def _used(self) -> int:
        return self.pool.size - self.pool.free - self.tree.evictable
