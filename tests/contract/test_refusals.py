# SPDX-License-Identifier: Apache-2.0
"""What cannot be served correctly is refused at start, by name, all of it at once."""

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.cuda_graph_config import (
    Phase,
    default_cuda_graph_config,
    with_phase,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

from lava_sglang.attention.backends import LavaAttnBackend, LavaCpuAttnBackend
from lava_sglang.attention.layers import attention_layers, layer_map
from lava_sglang.attention.query_capture import capture_queries
from lava_sglang.attention.window import WindowCapture
from lava_sglang.config import KVCompressionConfig, KVCompressionError, refuse
from lava_sglang.integration import hooks, plugin, refusals
from lava_sglang.integration.args import LavaServerArgs
from lava_sglang.kernels.ragged_decode import shape_reasons
from lava_sglang.layer_map import LayerMap
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool
from lava_sglang.methods import RAGGED_METHODS, UNIFORM_METHODS
from tests.contract.engine import build_engine
from tests.contract.resolving import start_reasons

DEFAULTS = {
    field: getattr(LavaServerArgs(model_path="dummy"), field)
    for field in LavaServerArgs.__struct_fields__
}

# One value that switches each refused feature on.
ON: dict[str, Any] = {
    "speculative_algorithm": "EAGLE",
    "disaggregation_mode": "prefill",
    "pp_size": 2,
    "enable_dp_attention": True,
    "attn_dp_size": 2,
    "attn_cp_size": 2,
    "dcp_size": 2,
    "enable_kv_cache_sharding": True,
    "enable_two_batch_overlap": True,
    "enable_pdmux": True,
    "enable_mixed_chunk": True,
    "enable_hisparse": True,
    "dllm_algorithm": "LowConfidence",
    "is_embedding": True,
    "encoder_only": True,
    "language_only": True,
    "kv_cache_dtype": "nvfp4",
    "enable_page_major_kv_layout": True,
    "enable_unified_memory": True,
    "prefill_only_disable_kv_cache": True,
    "enable_hierarchical_cache": True,
    "enable_unified_cache_external_linker": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "radix_cache_backend": "swa",
    "kv_canary": "log",
    "enable_deterministic_inference": True,
    "cuda_graph_backend_prefill": "full",
    "cuda_graph_config": with_phase(default_cuda_graph_config(), Phase.PREFILL, backend="full"),
}


def view_with(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **changes})


def test_every_refused_feature_has_a_value_above() -> None:
    assert {feature.field for feature in refusals.FEATURES} <= set(ON)


def test_nothing_is_refused_at_its_default() -> None:
    assert refusals.feature_reasons(view_with()) == []


@pytest.mark.parametrize("feature", refusals.FEATURES, ids=lambda feature: feature.field)
def test_a_feature_is_refused_by_name(feature: refusals.Feature) -> None:
    value = ON[feature.field]
    option = "--" + feature.field.replace("_", "-")
    (reason,) = refusals.feature_reasons(view_with(**{feature.field: value}))
    assert reason == f"{feature.name} is not supported ({option}={value!r})"


@pytest.mark.parametrize("dtype", ["nvfp4", "mxfp8", "fp4_mx_block16"])
def test_a_cache_of_blocks_with_scales_is_refused(dtype: str) -> None:
    (reason,) = refusals.feature_reasons(view_with(kv_cache_dtype=dtype))
    assert reason.startswith("a KV cache of four bits or with scales of its own is not supported")


@pytest.mark.parametrize("dtype", ["auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3"])
def test_a_plain_cache_and_one_of_eight_bits_are_served(dtype: str) -> None:
    assert refusals.feature_reasons(view_with(kv_cache_dtype=dtype)) == []


def test_all_features_are_refused_at_once() -> None:
    assert len(refusals.feature_reasons(view_with(**ON))) == len(refusals.FEATURES)


@pytest.mark.parametrize("variable", refusals.ENVIRONMENT)
def test_the_environment_is_refused_by_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    (reason,) = refusals.feature_reasons(view_with())
    assert variable in reason and "is not supported" in reason


@pytest.mark.parametrize("value", ["0", "false", "False", "no", "n"])
@pytest.mark.parametrize("variable", refusals.ENVIRONMENT)
def test_a_variable_that_sglang_reads_as_off_is_not_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert getattr(envs, variable).get() is False
    assert refusals.feature_reasons(view_with()) == []


@pytest.mark.parametrize("variable", refusals.ENVIRONMENT_OFF)
def test_what_is_needed_may_not_be_switched_off(variable: str) -> None:
    for value in ("", "1", "true"):
        assert refusals.environment_reasons({variable: value}) == []
    (reason,) = refusals.environment_reasons({variable: "0"})
    assert reason.endswith(f"is not supported ({variable}=0)")


@pytest.mark.parametrize("variable", {**refusals.ENVIRONMENT, **refusals.ENVIRONMENT_OFF})
def test_the_variables_are_sglangs(variable: str) -> None:
    assert hasattr(envs, variable)


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    assert refusals.version_reasons() == ["sglang==0.6.0 is installed: needs sglang==0.5.23"]


def test_no_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert refusals.version_reasons() == ["sglang is not installed: needs sglang==0.5.23"]


def test_refusing_raises_with_every_reason() -> None:
    refuse([])
    with pytest.raises(KVCompressionError) as caught:
        refuse(["one", "two"])
    assert caught.value.reasons == ["one", "two"]
    assert str(caught.value) == "KV compression cannot start:\n- one\n- two"


def test_a_hook_that_did_not_take_is_refused(
    plugin_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang logs the failure of a hook and goes on; we do not."""
    assert hooks.reasons() == []
    target = "sglang.srt.managers.scheduler.Scheduler.gone"
    monkeypatch.setattr(hooks, "_registered", set(hooks._registered))
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.copy())
    monkeypatch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
    assert hooks.add(target, lambda result: None, HookType.AFTER)
    with pytest.raises(KVCompressionError) as caught:
        plugin.install()
    assert caught.value.reasons == [f"hook on {target} was not applied: see SGLang's log above"]


def attention(**changes: Any) -> RadixAttention:
    layer = RadixAttention(num_heads=4, head_dim=8, scaling=0.3, num_kv_heads=2, layer_id=0)
    for name, value in changes.items():
        assert hasattr(layer, name), name
        setattr(layer, name, value)
    return layer


def model_of(*layers: nn.Module) -> nn.Module:
    """A model of these layers, in their order."""
    for layer_id, layer in enumerate(layers):
        if layer.layer_id == 0:
            layer.layer_id = layer_id
    return nn.ModuleList([nn.Linear(1, 1), *layers])


def test_a_plain_decoder_is_served() -> None:
    assert refusals.model_reasons(model_of(attention(), attention())) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"is_cross_attention": True}, "cross-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "bidirectional"),
        ({"logit_cap": 30.0}, "cap the attention logits of some layers"),
        ({"xai_temperature_len": 1024}, "cools with the length"),
        ({"v_head_dim": 4}, "differ in size"),
        ({"layer_id": 2}, "share or skip KV entries"),
    ],
)
def test_a_model_is_refused_for_one_of_its_layers(changes: dict[str, Any], word: str) -> None:
    (reason,) = refusals.model_reasons(model_of(attention(), attention(**changes)))
    assert word in reason


def test_a_model_is_refused_with_all_reasons() -> None:
    odd = attention(sliding_window_size=128, is_cross_attention=True, v_head_dim=4)
    assert len(refusals.model_reasons(model_of(odd))) == 3


def test_a_model_with_sliding_windows_and_capped_logits_is_served() -> None:
    full, sliding = attention(logit_cap=50.0), attention(logit_cap=50.0, sliding_window_size=127)
    model = model_of(sliding, full, sliding_too := attention(logit_cap=50.0))
    sliding_too.sliding_window_size = 127
    assert refusals.model_reasons(model) == []
    layers = layer_map(attention_layers(model), "cpu")
    assert (layers.sliding, layers.full, layers.sliding_window) == ((0, 2), (1,), 128)


@pytest.mark.parametrize(
    ("windows", "word"),
    [((127, 127), "all have a sliding window"), ((127, 63, -1), "several sliding windows")],
)
def test_windows_that_do_not_fit_are_refused(windows: tuple[int, ...], word: str) -> None:
    model = model_of(*(attention(sliding_window_size=window) for window in windows))
    (reason,) = refusals.model_reasons(model)
    assert word in reason
    with pytest.raises(KVCompressionError, match=word):
        layer_map(attention_layers(model), "cpu")


def test_logits_capped_by_another_function_are_refused() -> None:
    layers = [attention(logit_cap=30.0, logit_capping_method="other") for _ in range(2)]
    (reason,) = refusals.model_reasons(model_of(*layers))
    assert "by another function than tanh" in reason


def test_layers_that_share_their_entries_are_refused() -> None:
    layers = [attention(), attention(), attention()]
    model = model_of(*layers)
    assert refusals.model_reasons(model) == []
    layers[2].layer_id = 1
    (reason,) = refusals.model_reasons(model)
    assert "share or skip KV entries" in reason


@pytest.mark.parametrize("name", ["sinks", "attention_sink_bias"])
def test_attention_sinks_are_refused(name: str) -> None:
    """Models have them beside their attention, and None where a checkpoint has none."""
    block = nn.Module()
    block.attn = attention()
    setattr(block, name, None)
    assert refusals.model_reasons(block) == []
    setattr(block, name, nn.Parameter(torch.zeros(2)))
    (reason,) = refusals.model_reasons(block)
    assert "attention sinks" in reason


@pytest.mark.parametrize("option", ["enable_deterministic_inference", "rl_on_policy_target"])
def test_determinism_is_refused_by_name(model: str, option: str) -> None:
    """A request's decode is summed in pieces that depend on its neighbours."""
    value = {"rl_on_policy_target": "fsdp"}.get(option, True)
    options = {"kv_compression": "lava", "attention_backend": "triton", option: value}
    reasons = start_reasons(model, **options)
    assert [reason for reason in reasons if "deterministic inference is not supported" in reason]


def test_a_model_without_sglangs_attention_is_refused() -> None:
    (reason,) = refusals.model_reasons(model_of())
    assert "no attention layer" in reason


class LavaTorchNativeAttnBackend:
    """A backend that `capture_queries` was given."""

    captures_queries = True


class TorchNativeAttnBackend:
    """A backend that nothing was done to."""


def scheduler_with(**changes: Any) -> Any:
    """Real pools and tree, and the parts of a model runner that are looked at."""
    dtype = changes.pop("dtype", torch.float32)
    engine = build_engine(page_size=1, dtype=dtype)
    runner = SimpleNamespace(
        model_config=SimpleNamespace(
            is_encoder_decoder=changes.pop("encoder_decoder", False),
            attention_chunk_size=changes.pop("attention_chunk_size", None),
            dtype=changes.pop("model_dtype", dtype),
        ),
        attn_backend=changes.pop("attn_backend", LavaTorchNativeAttnBackend()),
        model=model_of(attention()),
    )
    allocator = changes.pop("allocator", engine.allocator)
    tree_cache = changes.pop("tree_cache", engine.tree)
    method = changes.pop("method", "snapkv")
    assert not changes
    return SimpleNamespace(
        kv_compression_config=KVCompressionConfig(method=method),
        token_to_kv_pool_allocator=allocator,
        tree_cache=tree_cache,
        tp_worker=SimpleNamespace(model_runner=runner),
    )


def allocator_of(pool: Any) -> Any:
    return SimpleNamespace(get_kvcache=lambda: pool)


def test_what_sglang_builds_for_a_plain_model_is_served(runtime_context: None) -> None:
    assert refusals.scheduler_reasons(scheduler_with()) == []


class OtherPool:
    """MLA, hybrid, quantized, ..."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allocator": allocator_of(OtherPool())}, "KV pool OtherPool"),
        ({"tree_cache": object()}, "prefix cache object"),
        ({"encoder_decoder": True}, "encoder-decoder"),
        ({"attn_backend": TorchNativeAttnBackend()}, "TorchNativeAttnBackend does not hand over"),
        (
            {"attn_backend": SimpleNamespace(prefill_backend=TorchNativeAttnBackend())},
            "TorchNativeAttnBackend does not hand over",
        ),
        ({"attention_chunk_size": 8192}, "chunk"),
        (
            {"dtype": torch.bfloat16, "model_dtype": torch.float16},
            "a KV cache of torch.bfloat16 for a model of torch.float16",
        ),
    ],
    ids=[
        "pool",
        "tree",
        "encoder-decoder",
        "backend",
        "hybrid backend",
        "attention chunks",
        "a cache of another dtype",
    ],
)
def test_what_sglang_built_is_refused_by_name(
    runtime_context: None, changes: dict[str, Any], words: str
) -> None:
    (reason,) = refusals.scheduler_reasons(scheduler_with(**changes))
    assert words in reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_checkpoint_with_an_fp8_cache_is_served(
    runtime_context: None, dtype: torch.dtype
) -> None:
    found = scheduler_with(dtype=dtype, model_dtype=torch.bfloat16)
    assert refusals.scheduler_reasons(found) == []


def test_a_hybrid_backend_that_captures_at_its_prefill_is_served(runtime_context: None) -> None:
    backend = SimpleNamespace(prefill_backend=LavaTorchNativeAttnBackend())
    assert refusals.scheduler_reasons(scheduler_with(attn_backend=backend)) == []


@pytest.mark.parametrize("method", RAGGED_METHODS)
def test_a_decode_backend_that_reads_equal_budgets_is_refused_for_a_ragged_method(
    runtime_context: None, method: str
) -> None:
    """At its own name, or as the decode half of a hybrid."""
    hybrid = SimpleNamespace(
        prefill_backend=LavaTorchNativeAttnBackend(), decode_backend=TorchNativeAttnBackend()
    )
    expected = (
        f"{method} keeps its own entries in each head, "
        "which only --decode-attention-backend lava and lava_flashinfer read (torch_native on a "
        "CPU)"
    )
    (alone,) = refusals.scheduler_reasons(scheduler_with(method=method))
    (half,) = refusals.scheduler_reasons(scheduler_with(method=method, attn_backend=hybrid))
    assert alone == f"decode attention backend LavaTorchNativeAttnBackend: {expected}"
    assert half == f"decode attention backend TorchNativeAttnBackend: {expected}"


@pytest.mark.parametrize("method", UNIFORM_METHODS)
def test_any_decode_backend_serves_a_uniform_method(runtime_context: None, method: str) -> None:
    hybrid = SimpleNamespace(
        prefill_backend=LavaTorchNativeAttnBackend(), decode_backend=TorchNativeAttnBackend()
    )
    assert refusals.scheduler_reasons(scheduler_with(method=method, attn_backend=hybrid)) == []


@pytest.mark.parametrize("method", [*RAGGED_METHODS, *UNIFORM_METHODS])
def test_a_backend_that_decodes_from_the_tape_serves_every_method(
    runtime_context: None, method: str
) -> None:
    alone = LavaCpuAttnBackend.__new__(LavaCpuAttnBackend)
    (unhooked,) = refusals.scheduler_reasons(scheduler_with(method=method, attn_backend=alone))
    assert "LavaCpuAttnBackend does not hand over its queries" in unhooked
    capture_queries(alone, WindowCapture(LayerMap.plain(1)))
    hybrid = SimpleNamespace(prefill_backend=LavaTorchNativeAttnBackend(), decode_backend=alone)
    for backend in (alone, hybrid):
        scheduler = scheduler_with(method=method, attn_backend=backend)
        assert refusals.scheduler_reasons(scheduler) == []


def test_sglangs_own_pool_is_refused(runtime_context: None) -> None:
    """Another plugin took the seam, or the hook did not: nothing would be addressable."""
    pool = build_engine(page_size=1).pool
    pool.__class__ = MHATokenToKVPool
    (reason,) = refusals.scheduler_reasons(scheduler_with(allocator=allocator_of(pool)))
    assert reason == "KV pool MHATokenToKVPool: only SGLang's plain MHA pool is supported"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda", "head_dim": 72, "v_head_dim": 72}, "head_dim=72: the kernels accept"),
        ({"device": "cuda", "head_dim": 512, "v_head_dim": 512}, "head_dim=512: the kernels"),
        ({"kv_cache_layout": "hnd"}, "laid out as hnd is not supported: unset SGLANG_USE_HND_KV"),
        ({"kv_cache_layout": "vectorized_5d"}, "laid out as vectorized_5d is not supported"),
        ({"v_head_dim": 32}, "keys of head_dim 64 and values of 32: accepts equal ones"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:18],
)
def test_a_pool_that_is_no_arena_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    pool = LavaMHATokenToKVPool.__new__(LavaMHATokenToKVPool)
    plain = {"device": "cpu", "head_dim": 64, "v_head_dim": 64, "kv_cache_layout": "nhd"}
    for name, value in {**plain, **changes}.items():
        setattr(pool, name, value)
    with pytest.raises(KVCompressionError) as caught:
        pool._create_buffers_normal()
    (reason,) = caught.value.reasons
    assert words in reason


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ((48, 1), ["48 query heads per KV head: the decode kernel accepts up to 16"]),
        ((6, 4), ["6 query heads over 4 KV heads: accepts a multiple"]),
        ((16, 1), []),
        ((64, 8), []),
    ],
)
def test_head_counts_that_the_decode_kernel_does_not_take(
    heads: tuple[int, int], words: list[str]
) -> None:
    assert shape_reasons(*heads) == words


@pytest.mark.parametrize(
    ("backend", "direction"),
    [
        (LavaAttnBackend, "forward_decode"),
        (LavaCpuAttnBackend, "forward_decode"),
        (LavaCpuAttnBackend, "forward_extend"),
    ],
)
def test_what_attention_is_handed_beyond_its_rows_is_refused(backend: Any, direction: str) -> None:
    """None is what a model hands over for what its checkpoint does not have."""
    forward = getattr(backend.__new__(backend), direction)
    rows: tuple[Any, ...] = (None, None, None, None, None)
    with pytest.raises(NotImplementedError, match="attention with return_lse, sinks is not"):
        forward(*rows, sinks=torch.zeros(2), return_lse=True, k_rope=None)
    with pytest.raises(AttributeError):  # goes on, to the rows that are not there
        forward(*rows, sinks=None)
