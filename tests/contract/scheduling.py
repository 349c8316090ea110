# SPDX-License-Identifier: Apache-2.0
"""SGLang's scheduler loop over the engine without a model: real admission, retraction, batches.

What is real: `LavaScheduler` with SGLang's own `get_next_batch_to_run`, `update_running_batch` and
`run_batch`'s place, `ScheduleBatch`, `PrefillAdder`, tree and pools. In place of the forward pass
every entry is written as what it is (`tests/contract/engine.py`). Results are processed at once, or
with overlap after the next batch has been scheduled, in the order of SGLang's two event loops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, ScheduleBatch, retract_all
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from lava_sglang.config import KVCompressionConfig
from lava_sglang.integration.scheduler import LavaScheduler
from lava_sglang.managers.demand import Demand
from lava_sglang.managers.request import LavaReq
from tests.contract.engine import Engine, build_engine

ABSENT = (
    *("_pending_chunked_abort_req", "dllm_config", "chunked_req", "dynamic_chunk_sizer"),
    *("min_free_slots_delayer", "prefill_delayer", "lora_drainer", "truncation_align_size"),
    *("decode_offload_manager", "scheduler_stage_metrics", "last_batch", "hisparse_coordinator"),
)
"""Parts of a scheduler that this one is built without."""

OFF = (
    *("enable_hierarchical_cache", "enable_unified_cache_external_linker", "enable_lmcache"),
    *("enable_hisparse", "require_mlp_sync", "enable_priority_preemption", "is_hybrid_swa"),
    *("is_mixed_chunk", "enable_lora", "enable_hicache_storage", "enable_priority_scheduling"),
    *("enable_lora_overlap_loading", "enable_overlap"),
)
"""Features that are off."""


class Served(LavaScheduler):
    """A scheduler with the engine's pools; `serve` runs its loop until nothing is left to do."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(
        self,
        config: KVCompressionConfig,
        *,
        slots: int = 512,
        page_size: int = 1,
        chunk: int | None = None,
        decode_steps: int = 0,
        overlap: bool = False,
        disable_radix_cache: bool = False,
        policy: str = "fcfs",
    ) -> None:
        """decode_steps: --prefill-decode-interval. overlap: results come a step later."""
        engine = build_engine(
            page_size, slots=slots, config=config, disable_radix_cache=disable_radix_cache
        )
        self.engine: Engine = engine
        self.overlap = self.enable_skip_finishing_decode = overlap
        for name in ABSENT:
            setattr(self, name, None)
        for name in OFF:
            setattr(self, name, False)
        self.kv_compression = engine.coordinator
        self.page_size = page_size
        self.device = "cpu"
        self.tree_cache = engine.tree
        self.token_to_kv_pool_allocator = engine.allocator
        self.req_to_token_pool = engine.rows
        self.model_config = SimpleNamespace(is_encoder_decoder=False, vocab_size=1000)
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.disaggregation_mode = DisaggregationMode.NULL
        self.chunked_prefill_size = chunk
        self.prefill_decode_interval = decode_steps
        self._prefill_decode_interval_remaining = 0
        self.prefill_decode_interval_min_bs = 0
        self.max_prefill_tokens = 16_384
        self.priority_scheduling_preemption_threshold = 0
        self.max_prefill_bs = 0
        self.max_running_requests = engine.rows.size
        self.processed_tokens_counter = self.forward_ct = 0
        self.new_token_ratio_tracker = NewTokenRatioTracker.from_config()
        self.policy = SchedulePolicy(policy, engine.tree, False, False, False)
        self.waiting_queue: list[LavaReq] = []
        self.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        self.dp_attn_adapter = SimpleNamespace(
            maybe_prepare_mlp_sync_batch=lambda batch, **_: batch,
            maybe_convert_decode_to_extend=lambda batch: batch,
        )
        self.ngram_embedding_manager = SimpleNamespace(prepare_for_forward=lambda batch, **_: batch)
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)
        self.beam_coordinator = SimpleNamespace(pending_member_rows=lambda batch: 0)
        self.load_inquirer = SimpleNamespace(_get_num_pending_tokens=lambda **_: 0)
        self.metrics_reporter = SimpleNamespace(enable_metrics=False, num_retracted_reqs=0)
        runner = SimpleNamespace(attn_backend=object(), prefill_aware_swa=False)
        self.tp_worker = SimpleNamespace(model_runner=runner)
        self.result_queue: deque[Any] = deque()
        self.finished: list[LavaReq] = []
        self.aborted: list[LavaReq] = []
        self.retractions = 0
        self.steps = 0
        engine.coordinator.demand = Demand(self)  # of the engine, of what runs here

    def get_num_allocatable_reqs(self, running_bs: int, *args: Any, **kwargs: Any) -> int:
        """Rows; no micro batches of a pipeline."""
        return int(self.req_to_token_pool.available_size())

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        self.retractions += 1
        self.waiting_queue.append(req)

    def send_abort_output(self, message: Any, req: Any) -> None:
        """SGLang ends a request that does not fit alone."""
        self.aborted.append(req)

    def send(self, length: int, first: int = 1, **kwargs: Any) -> LavaReq:
        """A request of tokens [first, first + length), queued."""
        return self.queue(self.engine.request(range(first, first + length), **self._own(kwargs)))

    def queue(self, req: LavaReq) -> LavaReq:
        limit = self.token_to_kv_pool_allocator.size - 1
        room = max(0, limit - len(req.origin_input_ids) - 1)
        req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, room)
        self.waiting_queue.append(req)
        return req

    def _own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"config": self.engine.coordinator.config, **kwargs}

    def step(self) -> str | None:
        """One turn of the event loop. Returns the kind of batch that ran."""
        self.steps += 1
        plan = self.get_next_batch_to_run(
            running_batch=self.running_batch, last_batch=self.last_batch
        )
        self.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            with forward_of(self):
                self.run_batch(batch)
            self.result_queue.append((batch.copy(), list(batch.reqs)))
        if self.overlap:
            if self.last_batch:
                self._process()
        elif batch:
            self._process()
        self.last_batch = batch
        if batch is None:
            return None
        return "extend" if batch.forward_mode.is_extend() else "decode"

    @property
    def nothing_runs(self) -> bool:
        batches = (self.running_batch, self.last_batch)
        idle = all(batch is None or batch.is_empty() for batch in batches)
        return idle and self.chunked_req is None and not self.result_queue

    def pause(self) -> None:
        """As `Scheduler.pause_generation` in mode "retract": all that runs is prefilled again."""
        if self.overlap and self.last_batch:
            self._process()
        last = self.last_batch
        retracted = [req for req in self.running_batch.reqs if not req.finished()]
        if last is not None and last.forward_mode.is_extend():
            retracted += [r for r in last.reqs if not r.finished() and r not in retracted]
        if self.chunked_req is not None and self.chunked_req not in retracted:
            retracted.append(self.chunked_req)
        self.last_batch = None
        retract_all(
            reqs=retracted,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
        )
        self.running_batch.reqs = []
        for req in retracted:
            self._add_request_to_queue(req)
        self.running_batch.batch_is_full = False
        self.chunked_req = None

    def serve(self, max_steps: int = 20_000, check: bool = False) -> None:
        """Until every request is answered. Raises AssertionError where nothing moves any more."""
        idle = 0
        while self.waiting_queue or self.running_batch.reqs or self.chunked_req or idle < 2:
            kind = self.step()
            if check:
                self.check()
            idle = idle + 1 if kind is None and not self.result_queue else 0
            assert idle < 20, f"{len(self.waiting_queue)} requests wait for ever"
            assert self.steps < max_steps
        self.check_idle()

    def check_idle(self) -> None:
        """Every slot is free or the tree's to evict."""
        tree, allocator = self.tree_cache, self.token_to_kv_pool_allocator
        assert tree.protected_size() == 0
        assert allocator.available_size() + tree.evictable_size() == allocator.size
        self.engine.prefilling, self.engine.decoding = [], []
        self.engine.check()

    def check(self) -> None:
        """Every slot has one owner."""
        running = [*self.running_batch.reqs, *(self.last_batch.reqs if self.last_batch else [])]
        running += [self.chunked_req] if self.chunked_req is not None else []
        live = [req for req in dict.fromkeys(running) if req.kv.holds_kv]
        self.engine.prefilling, self.engine.decoding = [], live
        self.engine.check_slots()

    def forward(self, batch: ScheduleBatch) -> None:
        """What the model's forward pass writes and hands over."""
        if batch.forward_mode.is_extend():
            for req in batch.reqs:
                self.engine.write(req, req.prefix_len, req.extend_end)
            self.engine.hand_over_queries(batch)  # type: ignore[arg-type]
            return
        for req in batch.reqs:
            position = int(req.kv.kv_committed_len) + req.slots_freed - 1
            self.engine.hand_over_decode_query(req, position)

    def _process(self) -> None:
        """As `process_batch_result_prefill` and `process_batch_result_decode`."""
        batch, reqs = self.result_queue.popleft()
        extend = batch.forward_mode.is_extend()
        for req in reqs:
            if req.finished() or req.is_retracted:
                continue
            if extend and req.inflight_middle_chunks > 0:
                req.inflight_middle_chunks -= 1
                continue
            req.output_ids.append(len(req.output_ids) + 1)
            if req.to_finish is not None:
                req.finished_reason = req.to_finish
            elif len(req.output_ids) >= req.sampling_params.max_new_tokens:
                req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
            if req.finished():
                release_kv_cache(req, self.tree_cache, checkpoint=True)
                self.finished.append(req)
            elif extend:
                checkpoint_kv_cache(req, self.tree_cache)


@contextmanager
def forward_of(scheduler: Served) -> Iterator[None]:
    """SGLang's own `run_batch` is the engine's forward pass."""
    stock: Any = LavaScheduler.__mro__[1]
    own = stock.run_batch
    stock.run_batch = lambda self, batch, *args, **kwargs: self.forward(batch)
    try:
        yield
    finally:
        stock.run_batch = own
