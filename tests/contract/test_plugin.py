# SPDX-License-Identifier: Apache-2.0
"""The hooks of a scheduler process that compresses: on SGLang's own functions, once each."""

import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry
from torch import nn

from lava_sglang.attention.backends import LavaAttnBackend, LavaCpuAttnBackend, RaggedDecode
from lava_sglang.attention.flashinfer import LavaFlashInferAttnBackend
from lava_sglang.attention.query_capture import attach_tape
from lava_sglang.attention.window import WindowQueries
from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.integration import hooks, plugin, seams
from lava_sglang.integration.scheduler import LavaScheduler
from lava_sglang.kernels.cpu.ragged_decode_jit import attend_kernel
from lava_sglang.layer_map import LayerMap
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool
from lava_sglang.mem_cache.tape import TapeTable
from tests.contract.engine import build_engine

RUNTIME_HOOKS = (
    seams.POOL,
    seams.CELL_SIZE,
    seams.POOL_SIZE,
    seams.ATTENTION,
    seams.POSITIONS,
    seams.MROPE,
    seams.PREFILL_LOG,
    seams.DECODE_LOG,
)


@pytest.fixture
def scheduler(runtime_context: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A scheduler whose hooks are installed, and gone from this process after the test."""
    originals = {}
    for seam in RUNTIME_HOOKS:
        owner, name = f"sglang.{seam.target}".rsplit(".", 1)
        place = pkgutil.resolve_name(owner)
        originals[place, name] = vars(place)[name]
    monkeypatch.setattr(hooks, "_registered", set(hooks._registered))
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.copy())
    monkeypatch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
    monkeypatch.setattr(
        attention_registry, "ATTENTION_BACKENDS", dict(attention_registry.ATTENTION_BACKENDS)
    )
    made: Any = LavaScheduler.__new__(LavaScheduler, SimpleNamespace(kv_compression="snapkv"))
    made.kv_compression_config = KVCompressionConfig(method="snapkv")
    made.add_log_parts = lambda parts, *args: [*parts, "#kv-comp-req: 2", "kv-comp slots saved: 30"]
    made.install_hooks()
    yield made
    for (place, name), value in originals.items():
        setattr(place, name, value)


def hook_on(seam: seams.Seam) -> Any:
    ((_, hook, _),) = HookRegistry._hooks[f"sglang.{seam.target}"]
    return hook


def test_every_hook_is_applied_once(scheduler: Any) -> None:
    assert {f"sglang.{seam.target}" for seam in RUNTIME_HOOKS} <= HookRegistry._patched
    scheduler.install_hooks()
    for seam in RUNTIME_HOOKS:
        assert len(HookRegistry._hooks[f"sglang.{seam.target}"]) == 1


def test_installing_twice_changes_nothing(plugin_installed: None) -> None:
    before = {target: len(hooks) for target, hooks in HookRegistry._hooks.items()}
    plugin.register()
    plugin.install()
    assert {target: len(hooks) for target, hooks in HookRegistry._hooks.items()} == before


def test_another_sglang_is_refused_before_a_scheduler_is_built(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lava_sglang.integration.refusals.SGLANG_VERSION", "0.5.99")
    with pytest.raises(KVCompressionError, match=r"needs sglang==0\.5\.99"):
        scheduler.install_hooks()


class Backend(AttentionBackend):
    """A backend of SGLang's, by its base class."""

    def init_forward_metadata(self, forward_batch: Any) -> None: ...

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **kwargs: Any) -> str:
        return f"extend {kwargs}"

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **kwargs: Any) -> str:
        return "decode"


def forward_mode(mode: str) -> SimpleNamespace:
    return SimpleNamespace(
        is_idle=lambda: False, is_decode=lambda: mode == "decode", is_mixed=lambda: False
    )


def model_runner() -> SimpleNamespace:
    """A model of two layers and its pools, as much as the tables are made from."""
    layers = [RadixAttention(4, 8, scaling, 2, layer) for layer, scaling in ((1, 0.5), (0, 0.25))]
    return SimpleNamespace(
        server_args=SimpleNamespace(enable_pdmux=False),
        hybrid_gdn_config=None,
        model_config=SimpleNamespace(dtype=torch.float32),
        model=nn.ModuleList(layers),
        token_to_kv_pool=build_engine().pool,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(5, 16, dtype=torch.int32)),
    )


def test_the_tables_are_made_with_the_first_backend_and_once(scheduler: Any) -> None:
    runner: Any = model_runner()
    hook_on(seams.ATTENTION)(Backend(), runner, None)
    state = runner.kv_compression
    assert state.tape.budgets.shape == (5,) and state.tape.offsets.shape == (5, 2 * 2 + 1)
    assert state.scaling.tolist() == [0.25, 0.5]  # by layer, whatever the modules' order
    assert state.req_to_token is runner.req_to_token_pool.req_to_token
    assert state.scores is None
    hook_on(seams.ATTENTION)(Backend(), runner, None)
    assert runner.kv_compression is state


class RaggedBackend(RaggedDecode, Backend):
    """A backend that decodes from the tape."""


def test_a_backend_that_decodes_from_the_tape_is_given_it(scheduler: Any) -> None:
    alone, uniform = RaggedBackend(), Backend()
    hybrid = Backend()
    runner: Any = model_runner()
    hybrid.decode_backend = RaggedBackend()  # type: ignore[attr-defined]
    for backend in (alone, uniform, hybrid):
        hook_on(seams.ATTENTION)(backend, runner, None)
    tape = runner.kv_compression.tape
    assert alone.tape is tape and hybrid.decode_backend.tape is tape  # type: ignore[attr-defined]
    assert not hasattr(uniform, "tape")


def cpu_runner(device: str) -> Any:
    """What a backend reads of SGLang's ModelRunner; a layer's decode has 9 query heads for 3."""
    return SimpleNamespace(
        device=device,
        tp_size=2,
        model_config=SimpleNamespace(
            num_attention_heads=18, get_num_kv_heads=lambda tp_size: 6 // tp_size, head_dim=64
        ),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(5, dtype=torch.int32)[None]),
        token_to_kv_pool=SimpleNamespace(
            arena=torch.ones(2, 2, 5, 3, 64), scales=lambda layer: (1.0, 1.0)
        ),
    )


def test_the_cpu_backend_has_compiled_its_decode_before_the_first_request(scheduler: Any) -> None:
    backend = attention_registry.ATTENTION_BACKENDS["torch_native"](cpu_runner("cpu"))
    compiled = attend_kernel(64, 3)
    signatures = list(compiled.signatures)
    assert signatures
    backend.tape, backend.layers = TapeTable(1, 2, 3, "cpu"), LayerMap.plain(2)
    layer = SimpleNamespace(
        layer_id=1, tp_q_head_num=9, qk_head_dim=64, scaling=0.125, logit_cap=0.0
    )
    batch = SimpleNamespace(req_pool_indices=torch.zeros(1).long(), seq_lens=torch.tensor([5]))
    q = torch.randn(1, 9 * 64)
    out = backend.forward_decode(q, None, None, layer, batch, save_kv_cache=False)
    torch.testing.assert_close(out, torch.ones_like(q))
    assert list(compiled.signatures) == signatures


def test_our_backends_are_registered_by_name(scheduler: Any) -> None:
    assert attention_registry.ATTENTION_BACKENDS["lava"] is LavaAttnBackend
    assert attention_registry.ATTENTION_BACKENDS["lava_flashinfer"] is LavaFlashInferAttnBackend
    made = {"cpu": LavaCpuAttnBackend, "cuda": TorchNativeAttnBackend}
    for device, backend in made.items():
        runner = cpu_runner(device)
        found = attention_registry.ATTENTION_BACKENDS["torch_native"](runner)
        assert type(found) is backend


def test_plain_attention_gets_the_arena_pool_and_other_kinds_theirs(scheduler: Any) -> None:
    platform = SRTPlatform()
    assert platform.get_kv_pool_cls(kind="mha") is LavaMHATokenToKVPool
    assert hook_on(seams.POOL)("stock", platform, kind="mla") == "stock"


def test_every_backend_hands_over_the_queries_of_an_extend(scheduler: Any) -> None:
    runner: Any = model_runner()
    backend = hook_on(seams.ATTENTION)(Backend(), runner, None)
    assert attention_registry.attn_backend_wrapper.__wrapped__ is not None
    assert isinstance(backend, Backend) and type(backend).__name__ == "LavaBackend"
    capture = runner.kv_compression.capture
    window = WindowQueries(1, 2)
    capture.add(window, 0, (0, 3), 3)
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=2, qk_head_dim=4)
    queries = torch.randn(3, 8)
    decode = SimpleNamespace(forward_mode=forward_mode("decode"))
    assert backend.forward(queries, None, None, layer, decode) == "decode"
    assert window.rows is None
    extend = SimpleNamespace(forward_mode=forward_mode("extend"))
    done = backend.forward(q=queries, k=None, v=None, layer=layer, forward_batch=extend)
    assert done == "extend {'save_kv_cache': True}"
    assert torch.equal(window.queries()[0], queries[1:].view(2, 2, 4))


@pytest.mark.parametrize(("mode", "expected"), [("decode", [13, 4]), ("extend", [3, 4])])
def test_only_decode_positions_are_shifted(scheduler: Any, mode: str, expected: list[int]) -> None:
    tape = TapeTable(4, 1, 2, "cpu")
    tape.commit(2, 0, 3, 10, torch.tensor([0, 1, 6]))
    runner = SimpleNamespace(kv_compression=SimpleNamespace(tape=tape))
    batch = SimpleNamespace(
        forward_mode=forward_mode(mode),
        positions=torch.tensor([3, 4]),
        req_pool_indices=torch.tensor([2, 1]),
    )
    batch_of_the_scheduler = SimpleNamespace(req_pool_indices_cpu=torch.tensor([2, 1]))
    args = (batch, ForwardBatch, batch_of_the_scheduler)
    assert hook_on(seams.POSITIONS)(*args, model_runner=runner) is None
    assert batch.positions.tolist() == expected
    assert not hasattr(batch, "req_pool_indices_cpu")


def test_a_backend_that_plans_on_the_host_gets_the_rows_there(scheduler: Any) -> None:
    tape = TapeTable(4, 1, 2, "cpu")
    state: Any = SimpleNamespace(tape=tape, layers=LayerMap.plain(1))
    runner = SimpleNamespace(kv_compression=state)
    planning = RaggedBackend()
    planning.plans_on_host = True
    attach_tape(planning, state)
    rows = torch.tensor([2, 1])
    batch = SimpleNamespace(
        forward_mode=forward_mode("decode"), positions=torch.tensor([3, 4]), req_pool_indices=rows
    )
    theirs = SimpleNamespace(req_pool_indices_cpu=rows.clone())
    hook_on(seams.POSITIONS)(batch, ForwardBatch, theirs, runner)
    assert batch.req_pool_indices_cpu is theirs.req_pool_indices_cpu
    host = tape.host
    attach_tape(planning, state)
    assert host is not None and tape.host is host


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_both_log_lines_carry_our_parts(scheduler: Any, phase: str) -> None:
    stats = PoolStats(
        full_num_used=10, full_token_usage=0.1, full_available_size=80, full_evictable_size=10
    )
    parts = getattr(stats, f"get_{phase}_usage_msg_parts")()
    assert parts[-2:] == ["#kv-comp-req: 2", "kv-comp slots saved: 30"]
    assert len(parts) > 2 and "token usage" in " ".join(parts)
