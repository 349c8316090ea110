# SPDX-License-Identifier: Apache-2.0
"""SGLang's scheduler with compression: its extension points, overridden."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_parallel

from lava_sglang.attention.query_capture import (
    attach_tape,
    capture_decode_queries,
    capture_queries,
    register_backends,
)
from lava_sglang.config import refuse
from lava_sglang.integration import hooks, refusals, seams
from lava_sglang.integration.args import config_of
from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.output_streamer import LavaOutputStreamer
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from lava_sglang.managers.request import LavaReq
from lava_sglang.mem_cache import memory_plan
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool
from lava_sglang.metrics import PrometheusSeries, running_totals

logger = logging.getLogger(__name__)


class LavaScheduler(Scheduler):
    """`Scheduler` (srt/managers/scheduler.py). `--kv-compression none` makes a stock one."""

    def __new__(cls, server_args: Any, *args: Any, **kwargs: Any) -> Any:
        if server_args.kv_compression == "none":
            # Not by its name: the plugin has put this class behind it in every module.
            stock: Any = cls.__base__
            return stock(server_args, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        self.kv_compression_config = config_of(server_args)
        self.kv_compression = KVCompressionCoordinator(self.kv_compression_config)
        self._add_kv_compression_hooks()
        super().__init__(server_args, *args, **kwargs)
        refuse(refusals.scheduler_reasons(self))
        self.kv_compression.attach_scheduler(self)
        self.kv_compression.warm_up()
        if self.metrics_reporter.enable_metrics:
            self.kv_compression.stats.prometheus = PrometheusSeries(self.metrics_collector.labels)
        logger.info("KV compression: %s", self.kv_compression_config)

    def _create_generation_req(self, recv_req: Any, *args: Any, **kwargs: Any) -> LavaReq:
        return LavaReq(*args, config=self.kv_compression_config, page_size=self.page_size, **kwargs)

    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_extend():
            return super().run_batch(batch, *args, **kwargs)
        self.kv_compression.begin_extend(batch)
        result = super().run_batch(batch, *args, **kwargs)
        self._ask_admission_again(batch, self.kv_compression.end_extend(batch))
        return result

    def update_running_batch(self, batch: Any) -> Any:
        self._ask_admission_again(batch, self.kv_compression.before_decode(batch))
        return super().update_running_batch(batch)

    def _ask_admission_again(self, batch: Any, worthwhile: bool) -> None:
        """It gave up for lack of slots, and SGLang asks again only when a request leaves.

        worthwhile: compression has freed slots, or a running request can shrink from now on.
        """
        if worthwhile:
            self.running_batch.batch_is_full = False
            batch.batch_is_full = False

    def get_prefill_adder_class(self) -> Any:
        return partial(
            LavaPrefillAdder,
            coordinator=self.kv_compression,
            decode_steps=self.prefill_decode_interval,
        )

    def get_output_streamer_class(self) -> type[LavaOutputStreamer]:
        return LavaOutputStreamer

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        allocator = self.token_to_kv_pool_allocator
        output.internal_state["kv_compression_stats"] = {
            # SGLang lists its data-parallel replicas in the order in which they answer.
            "dp_rank": get_parallel().dp_rank or 0,
            **self.kv_compression.stats.snapshot(self.running_batch.reqs),
            "pool_slots": allocator.size,
            "free_slots": allocator.available_size(),
            "evictable_slots": self.tree_cache.evictable_size(),
        }
        return output

    def on_idle(self) -> None:
        super().on_idle()
        self._observe_kv_compression()

    def kv_compression_log_parts(self) -> list[str]:
        """What the "Prefill batch" and "Decode batch" log lines add."""
        running = self._observe_kv_compression()
        return [f"#kv-comp-req: {running[0]}", f"kv-comp slots saved: {running[1]}"]

    def _add_kv_compression_hooks(self) -> None:
        coordinator = self.kv_compression
        register_backends()

        def capture(backend: Any, runner: Any, full_attn_backend: Any) -> Any:
            attach_tape(backend, coordinator.attach_model(runner))
            if coordinator.decode_queries is not None:
                capture_decode_queries(backend, coordinator.decode_queries)
            return capture_queries(backend, coordinator.capture)

        def arena_pool(result: Any, platform: Any, *, kind: str) -> Any:
            return LavaMHATokenToKVPool if kind == "mha" else result

        def cell_size(result: int, configurator: Any, kvc: Any, num_layers: int) -> int:
            num_kv_heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size)
            return result + memory_plan.slot_bytes(coordinator.config, num_layers, num_kv_heads)

        def pool_size(result: None, configurator: Any, kvc: Any) -> None:
            configurator._fixed_overhead_bytes += memory_plan.fixed_bytes(coordinator.config, kvc)

        def prepare_decode(
            forward_batch: Any, cls: type, batch: Any, *args: Any, **kwargs: Any
        ) -> None:
            tape = coordinator.tape
            if tape is None or not forward_batch.forward_mode.is_decode():
                return
            forward_batch.positions = tape.shift(
                forward_batch.positions, forward_batch.req_pool_indices
            )
            if tape.host is not None:  # SGLang hands the rows over with extend batches only
                forward_batch.req_pool_indices_cpu = batch.req_pool_indices_cpu

        def add_log_parts(parts: list[str], *args: Any) -> list[str]:
            return parts + self.kv_compression_log_parts()

        hooks.add(f"sglang.{seams.POOL.target}", arena_pool)
        hooks.add(f"sglang.{seams.ATTENTION.target}", capture)
        hooks.add(f"sglang.{seams.CELL_SIZE.target}", cell_size)
        hooks.add(f"sglang.{seams.POOL_SIZE.target}", pool_size)
        hooks.add(f"sglang.{seams.POSITIONS.target}", prepare_decode)
        hooks.add(f"sglang.{seams.PREFILL_LOG.target}", add_log_parts)
        hooks.add(f"sglang.{seams.DECODE_LOG.target}", add_log_parts)
        hooks.apply(check_seams=True)

    def _observe_kv_compression(self) -> tuple[int, int]:
        running = running_totals(self.running_batch.reqs)
        seconds = self.kv_compression.seconds()
        if self.kv_compression.stats.prometheus is not None:
            self.kv_compression.stats.prometheus.observe(running, seconds)
        return running
