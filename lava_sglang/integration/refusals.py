# SPDX-License-Identifier: Apache-2.0
"""What we run with, and refuse: versions, seams, SGLang features, models.

Every function here returns reasons, one sentence each; `config.refuse` raises with all of them.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from lava_sglang.config import KVCompressionConfig
from lava_sglang.integration.seams import SEAMS
from lava_sglang.methods import RAGGED_METHODS

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

SGLANG_VERSION = "0.5.23"


def version_reasons() -> list[str]:
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return [f"sglang is not installed: needs sglang=={SGLANG_VERSION}"]
    if found != SGLANG_VERSION:
        return [f"sglang=={found} is installed: needs sglang=={SGLANG_VERSION}"]
    return []


def seam_reasons() -> list[str]:
    """Places in SGLang that are gone or take other parameters than we count on."""
    reasons = []
    for seam in SEAMS:
        try:
            found = tuple(inspect.signature(_upstream(f"sglang.{seam.target}")).parameters)
        except (ImportError, AttributeError) as error:
            reasons.append(f"sglang.{seam.target} is missing: {error}")
            continue
        if found != seam.parameters:
            reasons.append(f"sglang.{seam.target} takes {found}: expected {seam.parameters}")
    return reasons


def _upstream(target: str) -> Any:
    """SGLang's own callable, also where our subclass stands in its class's place."""
    owner, name = target.rsplit(".", 1)
    found = pkgutil.resolve_name(owner)
    if isinstance(found, type) and found.__module__.startswith("lava_sglang."):
        found = found.__base__
    return getattr(found, name)


def flashinfer_reasons(config: KVCompressionConfig, device: str) -> list[str]:
    """What keeps `decode_kernel: "flashinfer"` from serving. device: of the server."""
    option = "--kv-compression-config decode_kernel='flashinfer'"
    if not config.ragged:
        return [
            f"{option}: of use to {', '.join(RAGGED_METHODS)} only; {config.method} decodes on "
            "--decode-attention-backend"
        ]
    import torch

    if torch.version.hip is not None:
        device = "ROCm"
    if device != "cuda":
        return [f"{option}: needs an NVIDIA GPU, this server runs on {device}"]
    try:
        import flashinfer
    except (ImportError, OSError) as error:
        return [f"{option}: FlashInfer cannot be imported: {error}"]
    return [f"{option}: {reason}" for reason in _call_reasons(flashinfer)]


def _call_reasons(flashinfer: Any) -> list[str]:
    """Calls of ours that the module does not take."""
    from lava_sglang.kernels.flashinfer_decode import CALLS

    reasons = []
    for target, arguments in CALLS.items():
        try:
            found = inspect.signature(attrgetter(target)(flashinfer))
        except AttributeError as error:
            reasons.append(f"flashinfer.{target} is missing: {error}")
            continue
        try:
            found.bind(**dict.fromkeys(arguments))
        except TypeError as error:
            reasons.append(f"flashinfer.{target} takes {tuple(found.parameters)}: {error}")
    return reasons


class Feature(NamedTuple):
    """An SGLang feature that is refused: it would read, move or share lossy entries."""

    field: str  # of the server arguments
    on: Callable[[Any], bool]
    name: str


def _set(value: Any) -> bool:
    return bool(value)


def _full_prefill_graph(config: Any) -> bool:
    """config: what SGLang resolved from the options and the JSON."""
    return config is not None and config.prefill.backend == "full"


FEATURES = (
    Feature("speculative_algorithm", _set, "speculative decoding"),
    Feature("disaggregation_mode", lambda v: v not in (None, "null"), "PD disaggregation"),
    Feature("pp_size", lambda v: v > 1, "pipeline parallelism"),
    Feature("enable_dp_attention", _set, "DP attention"),
    Feature("attn_dp_size", lambda v: (v or 1) > 1, "DP attention"),
    Feature("attn_cp_size", lambda v: (v or 1) > 1, "context-parallel attention"),
    Feature("dcp_size", lambda v: (v or 1) > 1, "decode context parallelism"),
    Feature("enable_kv_cache_sharding", _set, "KV cache sharding"),
    Feature("enable_two_batch_overlap", _set, "two-batch overlap"),
    Feature("enable_pdmux", _set, "PD multiplexing"),
    Feature("enable_mixed_chunk", _set, "mixed chunks"),
    Feature("enable_hisparse", _set, "hierarchical sparse attention"),
    Feature("dllm_algorithm", _set, "diffusion language models"),
    Feature("is_embedding", _set, "embedding models"),
    Feature("encoder_only", _set, "encoder disaggregation"),
    Feature("language_only", _set, "encoder disaggregation"),
    Feature(
        "kv_cache_dtype",
        lambda v: v not in ("auto", "bf16", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"),
        "a KV cache of four bits or with scales of its own",
    ),
    Feature("enable_page_major_kv_layout", _set, "the page-major KV layout"),
    Feature("enable_unified_memory", _set, "the unified memory pool"),
    Feature("prefill_only_disable_kv_cache", _set, "serving without a KV cache"),
    Feature("enable_hierarchical_cache", _set, "HiCache"),
    Feature("enable_unified_cache_external_linker", _set, "an external cache linker"),
    Feature("enable_lmcache", _set, "LMCache"),
    Feature("enable_flexkv", _set, "FlexKV"),
    Feature("radix_cache_backend", _set, "another radix cache"),
    Feature("kv_canary", lambda v: v != "none", "the KV canary"),
    Feature("enable_deterministic_inference", _set, "deterministic inference"),
    Feature("cuda_graph_config", _full_prefill_graph, "full CUDA graphs for prefill"),
)

ENVIRONMENT = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "sizing the KV pool after graph capture",
    "SGLANG_RUST_SERVER": "the Rust server",
}
ENVIRONMENT_OFF = {
    # SGLang's typed messages carry custom parameters of two levels; a request's ladder is a third,
    # and ends the scheduler that decodes it.
    "SGLANG_USE_PICKLE_IPC": "messages between processes without pickle",
}


def feature_reasons(view: Any) -> list[str]:
    """SGLang features that are on and not supported. view: resolved server arguments."""
    reasons = [
        f"{f.name} is not supported (--{f.field.replace('_', '-')}={getattr(view, f.field)!r})"
        for f in FEATURES
        if f.on(getattr(view, f.field))
    ]
    return reasons + environment_reasons(os.environ)


def environment_reasons(environ: Mapping[str, str]) -> list[str]:
    """Variables that switch on what is not supported, or off what is needed."""
    off = ("0", "false", "no", "n")
    return [
        f"{name} is not supported ({variable}={environ[variable]})"
        for variable, name in ENVIRONMENT.items()
        if environ.get(variable, "").lower() not in ("", *off)
    ] + [
        f"{name} is not supported ({variable}={environ[variable]})"
        for variable, name in ENVIRONMENT_OFF.items()
        if environ.get(variable, "").lower() in off
    ]


def scheduler_reasons(scheduler: Scheduler) -> list[str]:
    """What the loaded model and the pools that SGLang built do not fit. Shapes only, no tensors."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from lava_sglang.kernels.arena import FP8_DTYPES
    from lava_sglang.mem_cache.pool import pool_reasons

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    runner = scheduler.tp_worker.model_runner
    reasons = pool_reasons(pool)
    if reasons:
        pass
    elif pool.dtype not in (runner.model_config.dtype, *FP8_DTYPES):
        reasons.append(
            f"a KV cache of {pool.dtype} for a model of {runner.model_config.dtype} is not "
            "supported: accepts --kv-cache-dtype auto, fp8_e4m3 and fp8_e5m2"
        )
    if not isinstance(scheduler.tree_cache, UnifiedRadixCache):
        name = type(scheduler.tree_cache).__name__
        reasons.append(f"prefix cache {name}: only UnifiedRadixCache is supported")
    if runner.model_config.attention_chunk_size is not None:
        reasons.append("models with attention in chunks are not supported")
    if runner.model_config.is_encoder_decoder:
        reasons.append("encoder-decoder models are not supported")
    backend = runner.attn_backend
    prefill = getattr(backend, "prefill_backend", backend)
    if not getattr(prefill, "captures_queries", False):
        reasons.append(f"attention backend {type(prefill).__name__} does not hand over its queries")
    decode = getattr(backend, "decode_backend", backend)
    if scheduler.kv_compression_config.ragged and not hasattr(decode, "tape"):
        reasons.append(
            f"decode attention backend {type(decode).__name__}: "
            f"{scheduler.kv_compression_config.method} keeps its own entries in each head, "
            "which only --decode-attention-backend lava and lava_flashinfer read (torch_native on "
            "a CPU)"
        )
    return reasons + model_reasons(runner.model)


def model_reasons(model: Any) -> list[str]:
    """Attention layers whose scores we would get wrong."""
    from sglang.srt.layers.radix_attention import AttentionType

    from lava_sglang.attention.layers import attention_layers, sliding_reasons

    layers = attention_layers(model)
    reasons = sliding_reasons(layers)
    if any(layer.is_cross_attention for layer in layers):
        reasons.append("models with cross-attention are not supported")
    if any(layer.attn_type != AttentionType.DECODER for layer in layers):
        reasons.append("models with bidirectional attention are not supported")
    if len({layer.logit_cap for layer in layers}) > 1:
        reasons.append("models that cap the attention logits of some layers are not supported")
    if any(layer.logit_cap and layer.logit_capping_method != "tanh" for layer in layers):
        reasons.append("models that cap attention logits by another function than tanh are refused")
    if any((layer.xai_temperature_len or -1) > 0 for layer in layers):
        reasons.append(
            "models whose attention cools with the length (xai_temperature_len) are refused"
        )
    if any(layer.qk_head_dim != layer.v_head_dim for layer in layers):
        reasons.append("models whose keys and values differ in size are not supported")
    if [layer.layer_id for layer in layers] != list(range(len(layers))):
        reasons.append("models whose attention layers share or skip KV entries are not supported")
    sinks = ("sinks", "attention_sink_bias")
    if any(getattr(module, name, None) is not None for module in model.modules() for name in sinks):
        reasons.append("models with attention sinks are not supported")
    if not layers:
        reasons.append("the model has no attention layer of SGLang's RadixAttention")
    return reasons
