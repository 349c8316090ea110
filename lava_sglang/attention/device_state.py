# SPDX-License-Identifier: Apache-2.0
"""What compression keeps of a loaded model: its layers, and the tables beside its KV pool."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lava_sglang.attention.layers import attention_layers, layer_map
from lava_sglang.attention.window import DecodeQueries, WindowCapture
from lava_sglang.config import KVCompressionConfig, KVCompressionError, refuse
from lava_sglang.mem_cache.memory_plan import DECODE_QUERY_BYTES
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool, pool_reasons
from lava_sglang.mem_cache.score_table import ScoreTable
from lava_sglang.mem_cache.tape import TapeTable

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class DeviceState:
    """One per ModelRunner, as `runner.kv_compression`: made when SGLang builds the attention
    backend, when the pools exist and before a graph is captured.

    layers: which of the model's layers hold entries, and where. capture: what each layer's extend
    hands its queries to. dtype: the model's, of queries. scaling: float32 [full layers], factor on
    the product of a query and a stored key. logit_cap: of full layers. scores: None without a
    ladder, nothing is trimmed then. decode_queries: None without `decode_interval`.
    """

    def __init__(self, config: KVCompressionConfig, runner: ModelRunner):
        """Raises KVCompressionError if the pool is not ours, or the tables take too much memory."""
        refuse(pool_reasons(runner.token_to_kv_pool))
        self.pool: LavaMHATokenToKVPool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.dtype: torch.dtype = runner.model_config.dtype
        device = self.pool.device
        modules = attention_layers(runner.model)
        self.layers = layer_map(modules, device)
        full = [modules[layer] for layer in self.layers.full]
        self.num_qo_heads = full[0].tp_q_head_num
        self.logit_cap = float(full[0].logit_cap)
        scaling = [layer.scaling * self.pool.scales(layer)[0] for layer in full]
        self.scaling = torch.tensor(scaling, dtype=torch.float32, device=device)
        self.capture = WindowCapture(self.layers)
        num_rows, num_kv_heads = self.req_to_token.shape[0], self.pool.head_num
        self.tape = TapeTable(num_rows, self.layers.num_layers, num_kv_heads, device)
        self.scores: ScoreTable | None = None
        if config.has_ladder:
            self.scores = ScoreTable(
                num_rows, self.pool.arena.shape[2], self.layers, num_kv_heads, device
            )
        self.decode_queries: DecodeQueries | None = None
        if config.decode_interval is not None:
            self.decode_queries = self._decode_queries(config)

    def _decode_queries(self, config: KVCompressionConfig) -> DecodeQueries:
        num_rows, window_size = self.req_to_token.shape[0], config.window_size
        head_dim = self.pool.arena.shape[4]
        shape = (num_rows, len(self.layers.full), window_size, self.num_qo_heads, head_dim)
        size = math.prod(shape) * self.dtype.itemsize
        if size > DECODE_QUERY_BYTES:
            raise KVCompressionError(
                [
                    f"--kv-compression-config decode_interval={config.decode_interval}: the last "
                    f"{window_size} queries of {num_rows} requests take {size / 2**30:.1f} GiB, "
                    f"accepts up to {DECODE_QUERY_BYTES / 2**30:.0f}: --max-running-requests "
                    f"{DECODE_QUERY_BYTES * (num_rows - 1) // size} or a smaller window_size"
                ]
            )
        return DecodeQueries(self.layers, shape, self.dtype, self.pool.device)
