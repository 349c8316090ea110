# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV pool, carved from one arena instead of one allocation per layer."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lava_sglang.mem_cache.arena import create_arena, layer_views


class LavaMHATokenToKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` (srt/mem_cache/memory_pool.py): same constructor, slots and bytes.

    `arena` is [num_layers, 2, padded slots, num_kv_heads, head_dim]; `k_buffer` and `v_buffer` are
    its views, so every kernel of SGLang reads and writes it unchanged.
    """

    arena: torch.Tensor

    def _create_buffers_normal(self) -> None:
        shape, v_shape = self._kv_buffer_shapes()
        assert self.kv_cache_layout == "nhd" and shape == v_shape, (self.kv_cache_layout, v_shape)
        rows, num_kv_heads, head_dim = shape
        padded = -(-rows // self.page_size) * self.page_size
        in_custom_pool = (
            torch.cuda.use_mem_pool(self.custom_mem_pool)
            if self.enable_custom_mem_pool
            else nullcontext()
        )
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), in_custom_pool:
            self.arena = create_arena(
                self.layer_num, padded, num_kv_heads, head_dim, self.store_dtype, self.device
            )
        self.k_buffer, self.v_buffer = layer_views(self.arena, rows)
