# SPDX-License-Identifier: Apache-2.0
"""Entries of eight bits: SGLang writes them through its views, we read the arena."""

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lava_sglang.attention.device_state import DeviceState
from tests.contract.engine import HEAD_DIM, KV_HEADS, NUM_LAYERS, SCALING, build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

FP8 = torch.float8_e4m3fn


def layer_with(**scales: Any) -> RadixAttention:
    layer = RadixAttention(2 * KV_HEADS, HEAD_DIM, SCALING, KV_HEADS, NUM_LAYERS - 1)
    for name, value in scales.items():
        assert hasattr(layer, name), name
        setattr(layer, name, value)
    return layer


# A checkpoint's scales, those of --quantization-param-path, and none.
CHECKPOINT = {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(4.0)}
CHECKPOINT |= {"k_scale_float": 0.5, "v_scale_float": 4.0}
PARAMETERS = {"k_scale": 0.5, "v_scale": 0.5}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(CHECKPOINT, (0.5, 4.0)), (PARAMETERS, (0.5, 0.5)), ({}, (1.0, 1.0))],
    ids=["checkpoint", "parameters", "none"],
)
def test_what_sglang_writes_is_read_with_the_same_scales(
    given: dict[str, Any], expected: tuple[float, float]
) -> None:
    pool, layer = build_engine(dtype=FP8).pool, layer_with(**given)
    assert pool.arena.dtype == FP8 and pool.k_buffer[0].dtype == torch.uint8
    assert pool.scales(layer) == expected
    kv = torch.randn(2, 3, KV_HEADS, HEAD_DIM)
    slots = torch.tensor([7, 3, 9])
    location = KVWriteLoc(loc=slots)
    pool.set_kv_buffer(layer, location, *kv.clone(), layer.k_scale, layer.v_scale)
    for which, scale in enumerate(expected):
        read = pool.arena[NUM_LAYERS - 1, which, slots].float() * scale
        # Three bits of mantissa, and the smallest number of all.
        torch.testing.assert_close(read, kv[which], rtol=2**-4, atol=2**-10 * scale)


def test_entries_in_the_models_dtype_have_no_scale() -> None:
    """A calibrated checkpoint may be served without --kv-cache-dtype fp8_e4m3."""
    assert build_engine().pool.scales(layer_with(**CHECKPOINT)) == (1.0, 1.0)


def test_scores_are_those_of_the_keys_that_were_written() -> None:
    """The logits of a score are factors of what is stored, so K's scale is in the factor."""
    engine = build_engine(dtype=FP8)
    layers = torch.nn.ModuleList([layer_with(**CHECKPOINT), layer_with()])
    for layer_id, layer in enumerate(layers):
        layer.layer_id = layer_id
    runner: Any = type("Runner", (), {})()
    runner.model = layers
    runner.model_config = type("Config", (), {"dtype": torch.bfloat16})
    runner.token_to_kv_pool, runner.req_to_token_pool = engine.pool, engine.rows
    state = DeviceState(engine.config, runner)
    assert state.scaling.tolist() == pytest.approx([SCALING * 0.5, SCALING])
    assert state.dtype == torch.bfloat16
