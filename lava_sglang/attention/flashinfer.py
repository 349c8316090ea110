# SPDX-License-Identifier: Apache-2.0
"""Decode over the tape by FlashInfer: `decode_kernel: "flashinfer"` in the settings.

What it costs beside the Triton kernel: one plan on the host at every step, one for each layer when
the batch changes, and no CUDA graph of decode. A graph would need the plans of every layer for
every captured batch size, in buffers of the largest tape.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from lava_sglang.attention.backends import GpuRaggedDecode
from lava_sglang.attention.layers import attention_layers, sliding_window_of
from lava_sglang.config import refuse
from lava_sglang.kernels.flashinfer_decode import FlashInferDecode, shape_reasons
from lava_sglang.mem_cache.host_tape import HostPieces

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class LavaFlashInferAttnBackend(GpuRaggedDecode):
    """`--decode-attention-backend lava_flashinfer`, chosen for the user."""

    plans_on_host = True

    def __init__(self, runner: ModelRunner):
        super().__init__(runner)
        arena = self.token_to_kv_pool.arena
        layers = attention_layers(runner.model)
        scales = sorted({layer.scaling for layer in layers})
        reasons = shape_reasons(arena, self.num_qo_heads)
        if any(sliding_window_of(layer) or layer.logit_cap for layer in layers):
            reasons.append(
                "a model with sliding windows or capped logits: FlashInfer decode plans one call "
                "for all layers, accepts decode_kernel='triton'"
            )
        if len(scales) != 1:
            reasons.append(f"attention scales {scales}: FlashInfer decode accepts one for a model")
        refuse(reasons)
        self.decode = FlashInferDecode(
            importlib.import_module("flashinfer"), arena, self.num_qo_heads, self.max_bs, scales[0]
        )
        self.decode.warm_up()
        self.planned: list[HostPieces | None] | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan this step, and the tape if a request joined, left or was compressed."""
        rows = forward_batch.req_pool_indices_cpu
        if rows is None:  # SGLang's own batches at start
            rows = forward_batch.req_pool_indices.cpu()
        assert self.tape is not None and self.tape.host is not None
        pieces = self.tape.host.pieces(rows.tolist())
        tables = self.tables(self.req_to_token, forward_batch)
        # The same objects: the same requests in the same order, with the same tapes.
        if self.planned is None or list(map(id, pieces)) != list(map(id, self.planned)):
            self.decode.plan_tape(tables, self._offsets(pieces))
            self.planned = pieces
        budgets = torch.tensor([0 if p is None else p.budget for p in pieces])
        self.decode.plan_exact(tables, forward_batch.seq_lens_cpu - budgets)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError(
            "decode_kernel='flashinfer' plans on the host at every step, which no CUDA graph does: "
            "start with --disable-decode-cuda-graph"
        )

    def attend(
        self, queries: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        return self.decode.run(queries, layer.layer_id)

    def _offsets(self, pieces: list[HostPieces | None]) -> torch.Tensor:
        """int32 [bs, L * H + 1] on the host, zeros where uncompressed."""
        assert self.tape is not None
        offsets = torch.zeros(len(pieces), self.tape.offsets.shape[1], dtype=torch.int32)
        for row, piece in zip(offsets, pieces, strict=True):
            if piece is not None:
                row.copy_(piece.offsets)
        return offsets
