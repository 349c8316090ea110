# SPDX-License-Identifier: Apache-2.0
"""SGLang's pool shrinks by what compression allocates beside it, and holds its padded batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator
from sglang.srt.runtime_context import get_parallel

from lava_sglang.attention.backends import LavaAttnBackend
from lava_sglang.config import KVCompressionConfig
from lava_sglang.mem_cache import memory_plan

# An 8B model's shape.
LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM = 32, 32, 8, 128
MIB = 2**20

pytestmark = pytest.mark.usefixtures("runtime_context")


def model_config() -> Any:
    return SimpleNamespace(
        num_attention_heads=QO_HEADS,
        get_num_kv_heads=lambda tp_size: KV_HEADS // tp_size,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
    )


def fixed_bytes(device: str = "cuda", **settings: Any) -> int:
    kvc: Any = SimpleNamespace(
        model_config=model_config(),
        device=device,
        layer_info=SimpleNamespace(num_effective_layers=LAYERS),
    )
    return memory_plan.fixed_bytes(KVCompressionConfig(**settings), kvc)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many multiprocessors as an H100 has, on a machine that has none."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )


def runner(rows: int) -> Any:
    pool = SimpleNamespace(req_to_token=None, size=rows)
    return SimpleNamespace(
        req_to_token_pool=pool,
        token_to_kv_pool=None,
        model_config=model_config(),
        device="meta",
    )


def test_a_ragged_server_plans_its_workspace() -> None:
    """Of 4,096 requests, SGLang's most: the README says how much."""
    tables = fixed_bytes(method="snapkv")
    taken = fixed_bytes(method="lava") - tables
    assert tables < 5 * MIB
    assert 250 * MIB < taken < 280 * MIB
    assert fixed_bytes(method="lava", device="cpu") == tables


def test_the_plan_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "MAX_ROWS", 96)
    planned = fixed_bytes(method="lava") - fixed_bytes(method="snapkv")
    monkeypatch.setattr("lava_sglang.kernels.ragged_decode._multiprocessors", lambda device: 132)
    assert planned == LavaAttnBackend(runner(96)).workspace.nbytes


def test_the_queries_of_decode_steps_are_planned_up_to_their_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def queries() -> int:
        return fixed_bytes(method="lava", decode_interval=64) - fixed_bytes(method="lava")

    assert queries() == memory_plan.DECODE_QUERY_BYTES
    monkeypatch.setattr(memory_plan, "MAX_ROWS", 16)
    assert queries() == 17 * LAYERS * 32 * QO_HEADS * HEAD_DIM * 2


@pytest.mark.parametrize(
    ("settings", "entry_bytes"),
    [
        ({}, 0),
        ({"budget": (0.5, 0.25)}, 2),
        ({"decode_kernel": "flashinfer"}, 4),
        ({"budget": (0.5, 0.25), "decode_kernel": "flashinfer"}, 6),
        ({"method": "snapkv", "decode_kernel": "flashinfer"}, 0),
    ],
)
def test_a_slot_costs_its_scores_and_its_page_indices(
    settings: dict[str, Any], entry_bytes: int
) -> None:
    config = KVCompressionConfig(**{"method": "lava", **settings})
    assert memory_plan.slot_bytes(config, LAYERS, KV_HEADS) == LAYERS * KV_HEADS * entry_bytes


def test_flashinfers_buffers_are_planned() -> None:
    triton = fixed_bytes(method="lava")
    flashinfer = fixed_bytes(method="lava", decode_kernel="flashinfer")
    assert 128 * MIB < flashinfer < triton


def test_sglang_takes_the_bytes_off_its_pool() -> None:
    """The attribute that the hook adds to is what its division starts from."""
    configurator = DefaultPoolConfigurator.__new__(DefaultPoolConfigurator)
    configurator._cell_size, configurator._fixed_overhead_bytes = 100, 0
    before = configurator.calculate_pool_sizes(100_000, 1).max_total_num_tokens
    configurator._fixed_overhead_bytes += 20_000
    after = configurator.calculate_pool_sizes(100_000, 1).max_total_num_tokens
    assert (before, after) == (1000, 800)


def test_a_padded_batch_fits_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang captures batches of whole multiples of the attention's ranks, and pads to them."""
    monkeypatch.setattr(type(get_parallel()), "attn_tp_size", 4)
    monkeypatch.setattr("sglang.srt.utils.common.require_gathered_buffer", lambda: True)
    monkeypatch.setattr("sglang.srt.utils.common.require_mlp_sync", lambda: False)
    assert LavaAttnBackend(runner(18)).workspace.max_bs == 20
