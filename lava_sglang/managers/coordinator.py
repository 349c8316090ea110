# SPDX-License-Identifier: Apache-2.0
"""Compresses each request when the last chunk of its prefill has been launched.

Not when its result is processed: with overlap scheduling the first decode step is scheduled
before that. b is known on the host, so nothing is read back from the device.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lava_sglang.attention.window import WindowCapture, WindowQueries
from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.compact import compact
from lava_sglang.managers.request import CompressionPlan, LavaReq, SkipReason
from lava_sglang.mem_cache.row import alloc_slots, swap_in_private_slots
from lava_sglang.mem_cache.tape import TapeTable
from lava_sglang.metrics import CompressionStats, StreamTimer
from lava_sglang.policy import METHODS, Method, PromptView, keep

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

logger = logging.getLogger(__name__)


@cache
def method_of(config: KVCompressionConfig) -> Method:
    return METHODS[config.method](config)


class KVCompressionCoordinator:
    """One per scheduler. `attach_model` when SGLang builds its attention backend, before any graph
    is captured; `attach_scheduler` when all is built."""

    def __init__(self) -> None:
        self.capture = WindowCapture()
        self.stats = CompressionStats()
        self.tape: TapeTable | None = None

    def attach_model(self, runner: Any) -> TapeTable:
        """runner: SGLang's ModelRunner with its pools. Makes the tables once."""
        if self.tape is None:
            self.kv_pool = runner.token_to_kv_pool
            self.req_to_token = runner.req_to_token_pool.req_to_token
            self.scaling = attention_scaling(runner.model, self.kv_pool.device)
            self.timer = StreamTimer(self.kv_pool.device)
            self.tape = TapeTable(
                self.req_to_token.shape[0],
                self.kv_pool.layer_num,
                self.kv_pool.head_num,
                self.kv_pool.device,
            )
        return self.tape

    def attach_scheduler(self, scheduler: Any) -> None:
        self.stream = ForwardStream(scheduler)
        self.tree_cache = scheduler.tree_cache

    def begin_extend(self, batch: ScheduleBatch) -> None:
        """Before the launch: fix the plans, reset the rows, say which queries to stash."""
        assert self.tape is not None
        with self.stream:
            self.tape.reset(batch.req_pool_indices)
        if self.tape.host is not None:
            self.tape.host.reset(batch.req_pool_indices_cpu.tolist())
        batch_start = 0
        for req in batch.reqs:
            req.begin_prefill()
            if req.plan is not None and method_of(req.compression).needs_queries:
                if req.window is None:
                    req.window = WindowQueries(self.kv_pool.layer_num, req.compression.window_size)
                chunk = (req.prefix_len, req.extend_end)
                self.capture.add(req.window, batch_start, chunk, req.plan.prompt_len)
            batch_start += req.extend_len

    def end_extend(self, batch: ScheduleBatch) -> bool:
        """After the launch: compress what finished its prefill. Mutates the batch's lengths.

        Returns whether any request was compressed, and slots were freed.
        """
        self.capture.segments.clear()
        lengths: dict[int, int] = {}
        for i, req in enumerate(batch.reqs):
            if req.extend_end < len(req.full_untruncated_fill_ids):
                continue  # a middle chunk
            if req.plan is not None and req.to_finish is not None:
                req.plan, req.skip_reason = None, SkipReason.ABORTED
            if req.plan is not None and self._compress(req, req.plan):
                lengths[i] = req.plan.compressed_len
            req.window = None
            self.stats.count(req)
        if lengths:
            _set_lengths(batch, lengths)
        return bool(lengths)

    def _compress(self, req: LavaReq, plan: CompressionPlan) -> bool:
        method = method_of(req.compression)
        if method.needs_queries and (req.window is None or not req.window.complete):
            logger.error("no window queries for %s: served uncompressed", req.rid)
            req.skip_reason = SkipReason.NO_QUERIES
            return False
        slots = alloc_slots(self.tree_cache, plan.budget)
        if slots is None:
            req.skip_reason = SkipReason.NO_ROOM
            return False
        row = req.kv.req_pool_idx
        # A snapshot: the tree may rewrite the row.
        prompt_slots = self.req_to_token[row, : plan.prompt_len].long()
        self.stream.keep_alive(slots, prompt_slots)
        with self.stream, self.timer:
            assert self.tape is not None
            prompt = PromptView(
                arena=self.kv_pool.arena,
                slots=prompt_slots,
                queries=None if req.window is None else req.window.queries(),
                scaling=self.scaling,
                shared_prefix_len=plan.shared_prefix_len,
                window_size=req.compression.window_size,
            )
            kept = keep(method, prompt, plan.budget)
            compact(self.kv_pool.arena, prompt_slots, slots, kept.tape_tokens, kept.offsets)
            self.tape.commit(
                row, plan.shared_prefix_len, plan.budget, plan.slots_freed, kept.offsets
            )
        self.stream.fence_row_writes()
        swap_in_private_slots(req, self.tree_cache, plan.shared_prefix_len, slots)
        req.compressed = True
        return True


def attention_scaling(model: torch.nn.Module, device: torch.device | str) -> torch.Tensor:
    """Factor on the attention logits of each layer, float32 [num_layers]."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    ordered = sorted(layers, key=lambda layer: layer.layer_id)
    return torch.tensor([layer.scaling for layer in ordered], dtype=torch.float32, device=device)


class ForwardStream:
    """Enqueue work behind the forward pass that SGLang launched last.

    With overlap scheduling the scheduler runs on one stream and forward passes on another; without
    it, and on CPU, there is one queue and every method here does nothing.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.overlap = scheduler.enable_overlap and scheduler.device != "cpu"

    def __enter__(self) -> None:
        if self.overlap:
            self.scheduler.forward_stream_ctx.__enter__()
            self.scheduler.forward_stream.wait_stream(self.scheduler.schedule_stream)

    def __exit__(self, *exc: Any) -> None:
        if self.overlap:
            self.scheduler.forward_stream_ctx.__exit__(*exc)

    def keep_alive(self, *tensors: torch.Tensor) -> None:
        """Tensors made by the scheduler that work on this stream reads."""
        if self.overlap:
            for tensor in tensors:
                tensor.record_stream(self.scheduler.forward_stream)

    def fence_row_writes(self) -> None:
        """Keep the scheduler's next writes to rows behind what the forward pass reads of them."""
        if self.overlap:
            self.scheduler._apply_war_barrier()


def _set_lengths(batch: ScheduleBatch, lengths: dict[int, int]) -> None:
    """New length tensors: the in-flight forward holds the old ones."""
    seq_lens_cpu = batch.seq_lens_cpu.clone()
    for i, length in lengths.items():
        seq_lens_cpu[i] = length
    batch.seq_lens_cpu = seq_lens_cpu
    batch.seq_lens = seq_lens_cpu.to(
        device=batch.seq_lens.device, dtype=batch.seq_lens.dtype, non_blocking=True
    )
    batch.seq_lens_sum = None
