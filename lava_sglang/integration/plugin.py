# SPDX-License-Identifier: Apache-2.0
"""Puts our classes and hooks into SGLang: all of them are listed here, each stands beside what it
installs, and why it is needed is in `seams.py`.

`register` is what SGLang's loader calls in every process, before options are parsed: it adds the
options and puts the scheduler in place. A scheduler that compresses calls `install_in_scheduler`
before it builds anything. SGLang logs and swallows what a plugin raises, so `install` checks and
raises in our own code path: when the server arguments are unpickled in a child process.
"""

from __future__ import annotations

import sys
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from sglang.srt.plugins.hook_registry import HookType

from lava_sglang.integration import hooks, seams

if TYPE_CHECKING:
    from lava_sglang.integration.scheduler import LavaScheduler


def register() -> None:
    """Entry point `sglang.srt.plugins`. Idempotent."""
    from lava_sglang.config import DECODE_BACKENDS
    from lava_sglang.integration.args import LavaServerArgs, choose_decode_backend, validate

    if hooks.add("sglang.srt.server_args.ServerArgs", LavaServerArgs, HookType.REPLACE):
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
        from sglang.srt.server_args import add_attention_backend_choices

        register_resolution_hook(seams.VALIDATE.target.rsplit(".", 1)[1])(validate)
        register_resolution_hook(seams.BACKEND.target.rsplit(".", 1)[1])(choose_decode_backend)
        add_attention_backend_choices(list(DECODE_BACKENDS.values()))
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:  # its class attribute was bound before us
        engine.Engine.server_args_class = LavaServerArgs
    # Only where SGLang has the module anyway: naming a hook's target imports it.
    is_launcher = parent_process() is None
    if is_launcher or "sglang.srt.managers.tokenizer_manager" in sys.modules:
        from lava_sglang.integration.request_check import (
            check_generate,
            check_openai,
            refuse_settings,
        )
        from lava_sglang.managers.output_streamer import set_info

        hooks.add(f"sglang.{seams.META_INFO.target}", set_info, HookType.AROUND)
        hooks.add(f"sglang.{seams.GENERATE_CHECK.target}", check_generate, HookType.AROUND)
        hooks.add(f"sglang.{seams.COMPLETION_CHECK.target}", check_openai, HookType.AROUND)
        hooks.add(f"sglang.{seams.CHAT_CHECK.target}", check_openai, HookType.AROUND)
        hooks.add(f"sglang.{seams.ANTHROPIC.target}", refuse_settings, HookType.AROUND)
        hooks.add(f"sglang.{seams.OLLAMA_CHAT.target}", refuse_settings, HookType.AROUND)
        hooks.add(f"sglang.{seams.OLLAMA_GENERATE.target}", refuse_settings, HookType.AROUND)
        hooks.add(f"sglang.{seams.RESPONSES.target}", refuse_settings, HookType.AROUND)
    if "sglang.srt.managers.scheduler" in sys.modules:
        from lava_sglang.integration.scheduler import LavaScheduler

        LavaScheduler.install_hooks = install_in_scheduler
        hooks.add("sglang.srt.managers.scheduler.Scheduler", LavaScheduler, HookType.REPLACE)


def install_in_scheduler(scheduler: LavaScheduler) -> None:
    """Raises KVCompressionError with every hook that did not take and every place that differs."""
    from lava_sglang.attention.positions import mrope_of_true_lengths, shift_positions
    from lava_sglang.attention.query_capture import AttentionHook, register_backends
    from lava_sglang.mem_cache.cpu_fp8 import allow_without_amx, plain_entries
    from lava_sglang.mem_cache.memory_plan import MemoryPlan
    from lava_sglang.mem_cache.pool import use_arena_pool

    register_backends()
    config = scheduler.kv_compression_config
    plan = MemoryPlan(config)
    hooks.add(f"sglang.{seams.POOL.target}", use_arena_pool)
    hooks.add(f"sglang.{seams.CONFIGURE.target}", allow_without_amx, HookType.AROUND)
    hooks.add(f"sglang.{seams.QUANT_METHOD.target}", plain_entries, HookType.AROUND)
    hooks.add(f"sglang.{seams.CELL_SIZE.target}", plan.add_slot_bytes)
    hooks.add(f"sglang.{seams.POOL_SIZE.target}", plan.add_fixed_bytes)
    hooks.add(f"sglang.{seams.ATTENTION.target}", AttentionHook(config))
    hooks.add(f"sglang.{seams.POSITIONS.target}", shift_positions)
    hooks.add(f"sglang.{seams.MROPE.target}", mrope_of_true_lengths, HookType.AROUND)
    hooks.add(f"sglang.{seams.PREFILL_LOG.target}", scheduler.add_log_parts)
    hooks.add(f"sglang.{seams.DECODE_LOG.target}", scheduler.add_log_parts)
    hooks.apply(check_seams=True)


def install() -> None:
    """Register and apply now; raises KVCompressionError if a hook did not take."""
    register()
    hooks.apply()
