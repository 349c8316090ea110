# SPDX-License-Identifier: Apache-2.0
"""What compression takes of a GPU's memory beside the KV pool, before SGLang sizes the pool.

SGLang gives the pool what `--mem-fraction-static` leaves. What we allocate later, when its
attention backend is built, is in no plan of its own: on a full GPU it would come out of the memory
that the activations need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.utils.common import get_cuda_graph_max_batch_size, get_eager_max_batch_size

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels import flashinfer_decode
from lava_sglang.kernels.ragged_decode import DecodeWorkspace
from lava_sglang.kernels.trim import SCORE_DTYPE
from lava_sglang.mem_cache.tape import TapeTable

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

MAX_ROWS = 4096
"""Most requests that SGLang lets run if `--max-running-requests` does not say.
Source: `KVCacheConfigurator.resolve_max_num_reqs` (SGLang 0.5.23)."""

DECODE_QUERY_BYTES = 2 * 2**30
"""Most that the queries of decode steps may take, of all requests."""


def largest_batch(num_rows: int) -> int:
    """Requests in the largest decode batch of a pool of `num_rows`, with SGLang's padding: captured
    graphs, and batches without one, may be padded to a multiple of the attention's ranks."""
    return max(get_cuda_graph_max_batch_size(num_rows), get_eager_max_batch_size(num_rows))


class MemoryPlan:
    """AFTER hooks on `DefaultPoolConfigurator`: the pool shrinks by what we take beside it."""

    def __init__(self, config: KVCompressionConfig) -> None:
        self.config = config

    def add_slot_bytes(
        self,
        result: int,
        configurator: DefaultPoolConfigurator,
        kvc: KVCacheConfigurator,
        num_layers: int,
    ) -> int:
        """Hook on `_compute_cell_size`."""
        num_kv_heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size)
        return result + slot_bytes(self.config, num_layers, num_kv_heads)

    def add_fixed_bytes(
        self, result: None, configurator: DefaultPoolConfigurator, kvc: KVCacheConfigurator
    ) -> None:
        """Hook on `__init__`."""
        configurator._fixed_overhead_bytes += fixed_bytes(self.config, kvc)


def slot_bytes(config: KVCompressionConfig, num_layers: int, num_kv_heads: int) -> int:
    """Bytes that each slot of the pool takes elsewhere: a score and a page index an entry."""
    entry = SCORE_DTYPE.itemsize if config.has_ladder else 0
    if config.ragged and config.decode_kernel == "flashinfer":
        entry += torch.int32.itemsize
    return num_layers * num_kv_heads * entry


def fixed_bytes(config: KVCompressionConfig, kvc: KVCacheConfigurator) -> int:
    """Bytes that are taken whatever the pool's size is: the workspace of the decode kernel, the
    tables of compressed requests, and the queries of decode steps (`decode_interval`).

    For as many requests as may run, which SGLang decides when the pool's size is known: for
    `--max-running-requests`, or the most that SGLang takes without it.
    """
    model, tp_size = kvc.model_config, get_parallel().attn_tp_size
    num_rows = get_schedule().max_running_requests or MAX_ROWS
    num_layers = kvc.layer_info.num_effective_layers
    num_qo_heads = model.num_attention_heads // tp_size
    num_kv_heads = model.get_num_kv_heads(tp_size)
    # On the "meta" device a tensor has a size and no memory.
    taken = TapeTable(num_rows + 1, num_layers, num_kv_heads, "meta").nbytes
    if config.ragged and kvc.device != "cpu":
        max_bs = largest_batch(num_rows)
        if config.decode_kernel == "flashinfer":
            taken += flashinfer_decode.fixed_bytes(num_layers, num_kv_heads, max_bs, kvc.device)
        else:
            taken += DecodeWorkspace(
                max_bs, num_qo_heads, num_kv_heads, model.head_dim, kvc.device, allocate=False
            ).nbytes
    if config.decode_interval is not None:
        rows = (num_rows + 1) * num_layers * config.window_size * num_qo_heads
        taken += min(rows * model.head_dim * model.dtype.itemsize, DECODE_QUERY_BYTES)
    return taken
