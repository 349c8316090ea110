# SPDX-License-Identifier: Apache-2.0
"""Installs our classes and hooks in SGLang. The whole list is `seams.py`.

`register` is what SGLang's loader calls in every process, before options are parsed: it adds the
options and puts the scheduler in place. `install_runtime_hooks` runs only in a scheduler process
that compresses. SGLang logs and swallows what a plugin raises, so `install` checks and raises in
our own code path: when the server arguments are unpickled in a child process.
"""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from lava_sglang import seams

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_registered: set[str] = set()


def register() -> None:
    """Entry point `sglang.srt.plugins`. Idempotent."""
    from lava_sglang.args import LavaServerArgs, validate

    if _add(_SERVER_ARGS, LavaServerArgs, HookType.REPLACE):
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(seams.VALIDATE.target.rsplit(".", 1)[1])(validate)
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:  # its class attribute was bound before us
        engine.Engine.server_args_class = LavaServerArgs
    # Only where SGLang has the module anyway: naming a hook's target imports it.
    if "sglang.srt.managers.tokenizer_manager" in sys.modules or _is_launcher():
        from lava_sglang.managers.output_streamer import set_info

        _add(f"sglang.{seams.META_INFO.target}", set_info, HookType.AROUND)
    if "sglang.srt.managers.scheduler" in sys.modules:
        from lava_sglang.managers.scheduler import LavaScheduler

        _add(_SCHEDULER, LavaScheduler, HookType.REPLACE)


def install() -> None:
    """Register and apply now; raises KVCompressionError if a hook did not take."""
    from lava_sglang import compat

    register()
    HookRegistry.apply_hooks()
    compat.refuse(compat.version_reasons() + hook_reasons())


def install_runtime_hooks(scheduler: Any) -> None:
    """The hooks of a scheduler process that compresses; raises if one did not take.

    scheduler: the LavaScheduler being built; its `kv_compression` must exist.
    """
    from lava_sglang import compat
    from lava_sglang.attention.backend import capture_queries

    coordinator = scheduler.kv_compression

    def capture(backend: Any, runner: Any, full_attn_backend: Any) -> Any:
        return capture_queries(backend, coordinator.capture)

    def shift_positions(forward_batch: Any, *args: Any, **kwargs: Any) -> None:
        positions = coordinator.positions
        if positions is not None and forward_batch.forward_mode.is_decode():
            forward_batch.positions = positions.shift(
                forward_batch.positions, forward_batch.req_pool_indices
            )

    def add_log_parts(parts: list[str], *args: Any) -> list[str]:
        return parts + scheduler.kv_compression_log_parts()

    _add(f"sglang.{seams.ATTENTION.target}", capture)
    _add(f"sglang.{seams.POSITIONS.target}", shift_positions)
    _add(f"sglang.{seams.PREFILL_LOG.target}", add_log_parts)
    _add(f"sglang.{seams.DECODE_LOG.target}", add_log_parts)
    HookRegistry.apply_hooks()
    compat.refuse(compat.version_reasons() + compat.seam_reasons() + hook_reasons())


def hook_reasons() -> list[str]:
    """One sentence for every hook that SGLang did not apply (it logs the failure and goes on)."""
    return [
        f"hook on {target} was not applied: see SGLang's log above"
        for target in sorted(_registered - HookRegistry._patched)
    ]


def _add(target: str, hook: Any, hook_type: HookType = HookType.AFTER) -> bool:
    if target in _registered:
        return False
    HookRegistry.register(target, hook, hook_type)
    _registered.add(target)
    return True


def _is_launcher() -> bool:
    from multiprocessing import parent_process

    return parent_process() is None
