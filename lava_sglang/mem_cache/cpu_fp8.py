# SPDX-License-Identifier: Apache-2.0
"""Eight-bit entries on a CPU, for development: SGLang has them with AMX, in a layout of its own.

Ours are written and read as on a GPU, by the plain pool and by `kernels/cpu/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from sglang.srt.mem_cache import kv_cache_configurator

from lava_sglang.kernels.arena import FP8_DTYPES

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator


def _ours(configurator: KVCacheConfigurator) -> bool:
    return configurator.device == "cpu" and configurator.kv_cache_dtype in FP8_DTYPES


def allow_without_amx(
    original: Callable[..., Any], configurator: KVCacheConfigurator, **kwargs: Any
) -> Any:
    """AROUND hook on `KVCacheConfigurator.configure`, which refuses a CPU without AMX and every
    attention backend but its own. It asks two functions, which answer it so for this call."""
    if not _ours(configurator):
        return original(configurator, **kwargs)
    module = kv_cache_configurator
    with (
        patch.object(module, "cpu_has_amx_support", lambda: True),
        patch.object(module, "attention_backends", lambda: ("intel_amx",)),
    ):
        return original(configurator, **kwargs)


def plain_entries(
    original: Callable[..., Any], configurator: KVCacheConfigurator, *, num_layers: int
) -> Any:
    """AROUND hook on `_build_mha_quant_method`: no layout of AMX's."""
    return None if _ours(configurator) else original(configurator, num_layers=num_layers)
