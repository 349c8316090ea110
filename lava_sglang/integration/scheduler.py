# SPDX-License-Identifier: Apache-2.0
"""SGLang's scheduler with compression: its extension points, overridden."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_parallel

from lava_sglang.config import refuse
from lava_sglang.integration import refusals
from lava_sglang.integration.args import config_of
from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.output_streamer import LavaOutputStreamer
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from lava_sglang.managers.request import LavaReq
from lava_sglang.metrics import CompressionStats, PrometheusSeries, running_totals

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class LavaScheduler(Scheduler):
    """`Scheduler` (srt/managers/scheduler.py). `--kv-compression none` makes a stock one."""

    install_hooks: ClassVar[Callable[[LavaScheduler], None]]
    """Set by `plugin.py`, which lists the hooks and imports this module."""

    def __new__(cls, server_args: ServerArgs, *args: Any, **kwargs: Any) -> Any:
        if server_args.kv_compression == "none":
            # Not by its name: the plugin has put this class behind it in every module.
            stock: Any = cls.__base__
            return stock(server_args, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, server_args: ServerArgs, *args: Any, **kwargs: Any) -> None:
        self.kv_compression_config = config_of(server_args)
        self.install_hooks()
        super().__init__(server_args, *args, **kwargs)
        refuse(refusals.scheduler_reasons(self))
        series = None
        if self.metrics_reporter.enable_metrics:
            series = PrometheusSeries(self.metrics_collector.labels)
        self.kv_compression = KVCompressionCoordinator(
            self.kv_compression_config,
            self.tp_worker.model_runner.kv_compression,
            self,
            CompressionStats(series),
        )
        self.kv_compression.compressor.warm_up(self.kv_compression_config)
        logger.info("KV compression: %s", self.kv_compression_config)

    def _create_generation_req(self, recv_req: Any, *args: Any, **kwargs: Any) -> LavaReq:
        layers = self.tp_worker.model_runner.kv_compression.layers
        return LavaReq(
            *args,
            config=self.kv_compression_config,
            layers=layers,
            page_size=self.page_size,
            **kwargs,
        )

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_extend():
            return super().run_batch(batch, *args, **kwargs)
        self.kv_compression.begin_extend(batch)
        result = super().run_batch(batch, *args, **kwargs)
        self._ask_admission_again(batch, self.kv_compression.end_extend(batch))
        return result

    def update_running_batch(self, batch: ScheduleBatch) -> Any:
        self._ask_admission_again(batch, self.kv_compression.before_decode(batch))
        return super().update_running_batch(batch)

    def _ask_admission_again(self, batch: ScheduleBatch, worthwhile: bool) -> None:
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

    def add_log_parts(self, parts: list[str], *args: Any) -> list[str]:
        """AFTER hook on the parts of the "Prefill batch" and "Decode batch" log lines."""
        running = self._observe_kv_compression()
        return [*parts, f"#kv-comp-req: {running[0]}", f"kv-comp slots saved: {running[1]}"]

    def _observe_kv_compression(self) -> tuple[int, int]:
        running = running_totals(self.running_batch.reqs)
        seconds = self.kv_compression.seconds()
        if self.kv_compression.stats.prometheus is not None:
            self.kv_compression.stats.prometheus.observe(running, seconds)
        return running
