# SPDX-License-Identifier: Apache-2.0
"""Decode where each head reads its own number of entries, from the tape.

On a GPU: `--decode-attention-backend lava`, or `lava_flashinfer` (`flashinfer.py`), beside the
prefill backend that the user chose. On a CPU: in the place of `torch_native`, whose name SGLang's
CPU path asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from lava_sglang.config import refuse
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.cpu.extend import extend_cpu
from lava_sglang.kernels.cpu.ragged_decode import compile_ragged_decode, ragged_decode_cpu
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode, shape_reasons
from lava_sglang.layer_map import LayerMap
from lava_sglang.mem_cache.memory_plan import largest_batch
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool
from lava_sglang.mem_cache.tape import TapeTable

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class RaggedDecode:
    """What all backends share: the tables, and a layer's decode around its attention."""

    # Set by `attach_tape` once the pools exist.
    tape: TapeTable | None = None
    layers: LayerMap | None = None
    plans_on_host = False  # whether it needs `TapeTable.host`
    token_to_kv_pool: LavaMHATokenToKVPool

    def save(
        self,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        k: torch.Tensor,
        v: torch.Tensor,
        save_kv_cache: bool,
    ) -> None:
        """Write the batch's K and V, [num_tokens, num_kv_heads, head_dim], to its new slots. Where
        the entries are fp8 they are divided by the layer's scales, in place."""
        if save_kv_cache and k is not None:
            location = KVWriteLoc.for_batch(forward_batch)
            scales = (layer.k_scale, layer.v_scale)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, *scales)

    def save_and_attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """q: [bs, num_qo_heads * head_dim]. Returns the same shape. Writes K and V to the pool."""
        self.save(layer, forward_batch, k, v, save_kv_cache)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        return self.attend(queries, layer, forward_batch).view(q.shape[0], -1)

    def attend(
        self, queries: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """Decode attention of one layer: [bs, num_qo_heads, head_dim] of queries of that shape."""
        raise NotImplementedError

    def arena_layer(self, layer: RadixAttention) -> int:
        assert self.layers is not None
        return self.layers.arena_layer(layer.layer_id)

    def kernel_options(self, layer: RadixAttention) -> dict[str, Any]:
        """In what else layers differ, by the names that all kernels have for it."""
        assert self.layers is not None
        k_scale, v_scale = self.token_to_kv_pool.scales(layer)
        return {
            "sliding_window": self.layers.window_of(layer.layer_id),
            "logit_cap": layer.logit_cap,
            "k_scale": k_scale,
            "v_scale": v_scale,
        }

    def refuse_keywords(self, keywords: dict[str, Any]) -> None:
        """What a model hands to its attention beyond q, k and v changes the result.

        Raises NotImplementedError; SGLang's own warm-up pass meets it before the server is ready.
        Models hand over None for what a checkpoint does not have.
        """
        unknown = sorted(name for name, value in keywords.items() if value is not None)
        if unknown:
            raise NotImplementedError(
                f"KV compression: attention with {', '.join(unknown)} is not supported"
            )

    def tables(self, req_to_token: torch.Tensor, forward_batch: ForwardBatch) -> BatchTables:
        """The kernel's view of the batch, in its order."""
        assert self.tape is not None
        return BatchTables(
            req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            self.tape.prefix_lens,
            self.tape.budgets,
            self.tape.offsets,
        )


class GpuRaggedDecode(RaggedDecode, AttentionBackend):
    """What both GPU backends share: they decode only."""

    def __init__(self, runner: ModelRunner):
        super().__init__()
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_bs = largest_batch(runner.req_to_token_pool.size)
        self.tp_size = get_parallel().attn_tp_size
        self.num_qo_heads = runner.model_config.num_attention_heads // self.tp_size

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """Every layer reads rows and tables: the scheduler may write them after the replay."""
        return SharedReadEnds.POST_REPLAY

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self.refuse_keywords(kwargs)
        return self.save_and_attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("prefill runs on the backend of --prefill-attention-backend")


class LavaAttnBackend(GpuRaggedDecode):
    """Decode by the Triton kernel. It plans nothing: the kernel computes addresses from
    `req_to_token`, the lengths and the tape's tables, all at fixed addresses, so a captured graph
    needs no metadata of its own."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner):
        super().__init__(runner)
        num_kv_heads = runner.model_config.get_num_kv_heads(self.tp_size)
        refuse(shape_reasons(self.num_qo_heads, num_kv_heads))
        self.workspace = DecodeWorkspace(
            self.max_bs,
            self.num_qo_heads,
            num_kv_heads,
            runner.model_config.head_dim,
            runner.device,
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Nothing to plan."""

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Nothing to plan."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """The workspace is already at its fixed address."""

    def attend(
        self, queries: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        return ragged_decode(
            queries,
            self.token_to_kv_pool.arena,
            self.arena_layer(layer),
            self.tables(self.req_to_token, forward_batch),
            layer.scaling,
            **self.kernel_options(layer),
            workspace=self.workspace,
        )


class LavaCpuAttnBackend(RaggedDecode, TorchNativeAttnBackend):
    """SGLang's `torch_native` with a compiled decode over the tape, and an extend that does not
    compute the prefix's own attention again for every chunk."""

    def __init__(self, runner: ModelRunner):
        super().__init__(runner)
        config, tp_size = runner.model_config, get_parallel().attn_tp_size
        # Seconds on a new machine: here, and not in the first request.
        compile_ragged_decode(
            config.num_attention_heads // tp_size,
            config.get_num_kv_heads(tp_size),
            config.head_dim,
            self.token_to_kv_pool.arena.dtype,
        )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self.refuse_keywords(kwargs)
        return self.save_and_attend(q, k, v, layer, forward_batch, save_kv_cache)

    def attend(
        self, queries: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        out = torch.empty_like(queries)
        ragged_decode_cpu(
            queries,
            self.token_to_kv_pool.arena,
            self.arena_layer(layer),
            self.tables(self.req_to_token_pool.req_to_token, forward_batch),
            layer.scaling,
            out,
            **self.kernel_options(layer),
        )
        return out

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q: [num_tokens, num_qo_heads * head_dim]. Returns the same shape."""
        self.refuse_keywords(kwargs)
        self.save(layer, forward_batch, k, v, save_kv_cache)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(queries)
        extend_cpu(
            queries,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            forward_batch.extend_prefix_lens_cpu,
            forward_batch.extend_seq_lens_cpu,
            layer.scaling,
            out,
            **self.kernel_options(layer),
        )
        return out.view(q.shape[0], -1)
