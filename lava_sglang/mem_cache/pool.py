# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV pool, carved from one arena instead of one allocation per layer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lava_sglang.config import refuse
from lava_sglang.kernels.arena import FP8_DTYPES, head_dim_reasons
from lava_sglang.mem_cache.arena import create_arena, layer_views

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def use_arena_pool(result: Any, platform: Any, *, kind: str) -> Any:
    """AFTER hook on `SRTPlatform.get_kv_pool_cls`: plain attention gets the arena."""
    return LavaMHATokenToKVPool if kind == "mha" else result


def pool_reasons(pool: Any) -> list[str]:
    """Why compression cannot work on SGLang's `pool`, one sentence each."""
    if isinstance(pool, LavaMHATokenToKVPool):
        return []
    return [f"KV pool {type(pool).__name__}: only SGLang's plain MHA pool is supported"]


class LavaMHATokenToKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` (srt/mem_cache/memory_pool.py): same constructor, slots and bytes.

    `arena` is [num_layers, 2, padded slots, num_kv_heads, head_dim] in the dtype of the entries;
    `k_buffer` and `v_buffer` are its views, so every kernel of SGLang reads and writes it
    unchanged. Of fp8 entries the views are bytes, as SGLang has them.
    """

    arena: torch.Tensor

    def _reasons(self) -> list[str]:
        """Why the arena cannot be these buffers, one sentence each."""
        reasons = [] if self.device == "cpu" else head_dim_reasons(self.head_dim)
        if self.kv_cache_layout != "nhd":
            reasons.append(
                f"a KV pool laid out as {self.kv_cache_layout} is not supported: unset "
                "SGLANG_USE_HND_KVCACHE and SGLANG_AITER_KV_CACHE_LAYOUT"
            )
        if self.head_dim != self.v_head_dim:
            reasons.append(
                f"keys of head_dim {self.head_dim} and values of {self.v_head_dim}: "
                "accepts equal ones"
            )
        return reasons

    def scales(self, layer: RadixAttention) -> tuple[float, float]:
        """What a layer's K and V entries were divided by before they became fp8: the checkpoint's
        calibration, 1 without one and for entries in the model's own dtype."""
        if self.dtype not in FP8_DTYPES:
            return 1.0, 1.0
        k_scale = _scale(layer.k_scale_float, layer.k_scale)
        return k_scale, _scale(layer.v_scale_float, layer.v_scale)

    def _create_buffers_normal(self) -> None:
        refuse(self._reasons())
        rows, num_kv_heads, head_dim = self._kv_buffer_shapes()[0]
        padded = -(-rows // self.page_size) * self.page_size
        in_custom_pool = (
            torch.cuda.use_mem_pool(self.custom_mem_pool)
            if self.enable_custom_mem_pool
            else nullcontext()
        )
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), in_custom_pool:
            stored = create_arena(
                self.layer_num, padded, num_kv_heads, head_dim, self.store_dtype, self.device
            )
        self.arena = stored.view(self.dtype)
        self.k_buffer, self.v_buffer = layer_views(stored, rows)


def _scale(on_host: float | None, written_with: float | torch.Tensor | None) -> float:
    """A scale of a layer. SGLang keeps a checkpoint's as a tensor and on the host, and one of
    `--quantization-param-path` as a number, which is in no other place."""
    if on_host is not None:
        return on_host
    return 1.0 if written_with is None else float(written_with)
