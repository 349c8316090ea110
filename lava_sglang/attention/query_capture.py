# SPDX-License-Identifier: Apache-2.0
"""The attention backend the user chose, made to hand its queries to the window capture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from lava_sglang.attention.backends import LavaAttnBackend, LavaCpuAttnBackend, RaggedDecode
from lava_sglang.attention.device_state import DeviceState
from lava_sglang.attention.flashinfer import LavaFlashInferAttnBackend
from lava_sglang.attention.window import DecodeQueries, WindowCapture
from lava_sglang.config import DECODE_BACKENDS, KVCompressionConfig
from lava_sglang.mem_cache.host_tape import HostTape

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class AttentionHook:
    """AFTER hook on `attn_backend_wrapper`, the one place that every backend passes."""

    def __init__(self, config: KVCompressionConfig) -> None:
        self.config = config

    def __call__(
        self, backend: AttentionBackend, runner: ModelRunner, full_attn_backend: AttentionBackend
    ) -> AttentionBackend:
        """The backend, which from now on hands over its queries and knows the tape. Puts the tables
        on the runner, as `runner.kv_compression`, when its first backend comes by."""
        if not hasattr(runner, "kv_compression"):
            runner.kv_compression = DeviceState(self.config, runner)
        state: DeviceState = runner.kv_compression
        attach_tape(backend, state)
        if state.decode_queries is not None:
            capture_decode_queries(backend, state.decode_queries)
        return capture_queries(backend, state.capture)


def register_backends() -> None:
    """Make our backends known to SGLang, in a scheduler process that compresses."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(DECODE_BACKENDS["triton"])(LavaAttnBackend)
    register_attention_backend(DECODE_BACKENDS["flashinfer"])(LavaFlashInferAttnBackend)
    register_attention_backend("torch_native")(torch_native)


def torch_native(runner: ModelRunner) -> Any:
    """SGLang's own on a GPU, ours on a CPU."""
    backend = LavaCpuAttnBackend if runner.device == "cpu" else TorchNativeAttnBackend
    return backend(runner)


def capture_queries(backend: AttentionBackend, capture: WindowCapture) -> Any:
    """Give `backend` a subclass whose `forward_extend` also stashes window queries. Mutates it.

    A subclass and not a proxy: SGLang reads dozens of attributes off its backends and checks
    their identity. On the backend and not on RadixAttention: that one does not run when a prefill
    graph is replayed. A HybridAttnBackend calls its prefill backend's `forward` itself, so that
    one is given the subclass.
    """
    if isinstance(backend, HybridAttnBackend):
        capture_queries(backend.prefill_backend, capture)
        return backend
    base = type(backend)

    def forward_extend(
        self: AttentionBackend,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = base.forward_extend(self, q, k, v, layer, *args, **kwargs)
        if capture.segments:
            capture.capture(layer, q)
        return output

    members = {"forward_extend": forward_extend, "captures_queries": True}
    backend.__class__ = type(f"Lava{base.__name__}", (base,), members)
    return backend


def capture_decode_queries(backend: AttentionBackend, stash: DecodeQueries) -> None:
    """Give `backend`, or its decode part, a subclass that stashes decode queries. Mutates it."""
    if isinstance(backend, HybridAttnBackend):
        backend = backend.decode_backend
    base = type(backend)

    def forward_decode(
        self: AttentionBackend,
        q: Any,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        stash.store(layer, q, forward_batch)
        return base.forward_decode(self, q, k, v, layer, forward_batch, *args, **kwargs)

    members = {"forward_decode": forward_decode, "stashes_decode_queries": True}
    backend.__class__ = type(f"Tail{base.__name__}", (base,), members)


def attach_tape(backend: AttentionBackend, state: DeviceState) -> None:
    """Give the tables of compressed requests to the backend that decodes from them, if any."""
    for part in (backend, getattr(backend, "decode_backend", None)):
        if isinstance(part, RaggedDecode):
            part.tape, part.layers = state.tape, state.layers
            if part.plans_on_host and state.tape.host is None:
                state.tape.host = HostTape()
