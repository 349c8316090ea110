# SPDX-License-Identifier: Apache-2.0
"""The hooks of a scheduler process that compresses: on SGLang's own functions, once each."""

import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats
from sglang.srt.plugins.hook_registry import HookRegistry

from lava_sglang import hooks, plugin, seams
from lava_sglang.attention.window import WindowQueries
from lava_sglang.config import KVCompressionError
from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.scheduler import LavaScheduler
from lava_sglang.mem_cache.positions import PositionDeltas

RUNTIME_HOOKS = (seams.ATTENTION, seams.POSITIONS, seams.PREFILL_LOG, seams.DECODE_LOG)


@pytest.fixture
def scheduler(plugin_installed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A scheduler whose hooks are installed, and gone from this process after the test."""
    originals = {}
    for seam in RUNTIME_HOOKS:
        owner, name = f"sglang.{seam.target}".rsplit(".", 1)
        place = pkgutil.resolve_name(owner)
        originals[place, name] = vars(place)[name]
    monkeypatch.setattr(hooks, "_registered", set(hooks._registered))
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.copy())
    monkeypatch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
    made: Any = LavaScheduler.__new__(LavaScheduler, SimpleNamespace(kv_compression="snapkv"))
    made.kv_compression = KVCompressionCoordinator()
    made.kv_compression_log_parts = lambda: ["#kv-comp-req: 2", "kv-comp slots saved: 30"]
    made._add_kv_compression_hooks()
    yield made
    for (place, name), value in originals.items():
        setattr(place, name, value)


def hook_on(seam: seams.Seam) -> Any:
    ((_, hook, _),) = HookRegistry._hooks[f"sglang.{seam.target}"]
    return hook


def test_every_hook_is_applied_once(scheduler: Any) -> None:
    assert {f"sglang.{seam.target}" for seam in RUNTIME_HOOKS} <= HookRegistry._patched
    scheduler._add_kv_compression_hooks()
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
    monkeypatch.setattr("lava_sglang.compat.SGLANG_VERSION", "0.5.99")
    with pytest.raises(KVCompressionError, match=r"needs sglang==0\.5\.99"):
        scheduler._add_kv_compression_hooks()


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


def test_every_backend_hands_over_the_queries_of_an_extend(scheduler: Any) -> None:
    from sglang.srt.layers.attention import attention_registry

    runner = SimpleNamespace(
        server_args=SimpleNamespace(enable_pdmux=False), hybrid_gdn_config=None
    )
    backend = hook_on(seams.ATTENTION)(Backend(), runner, None)
    assert attention_registry.attn_backend_wrapper.__wrapped__ is not None
    assert isinstance(backend, Backend) and type(backend).__name__ == "LavaBackend"
    capture = scheduler.kv_compression.capture
    window = WindowQueries(1, 2)
    capture.add(window, 0, (0, 3), 3)
    layer = SimpleNamespace(layer_id=0, scaling=0.5, tp_q_head_num=2, qk_head_dim=4)
    queries = torch.randn(3, 8)
    decode = SimpleNamespace(forward_mode=forward_mode("decode"))
    assert backend.forward(queries, None, None, layer, decode) == "decode"
    assert window.rows is None
    extend = SimpleNamespace(forward_mode=forward_mode("extend"))
    done = backend.forward(q=queries, k=None, v=None, layer=layer, forward_batch=extend)
    assert done == "extend {'save_kv_cache': True}"
    assert torch.equal(window.layer(0), queries[1:].view(2, 2, 4))


@pytest.mark.parametrize(("mode", "expected"), [("decode", [13, 4]), ("extend", [3, 4])])
def test_only_decode_positions_are_shifted(scheduler: Any, mode: str, expected: list[int]) -> None:
    scheduler.kv_compression.positions = PositionDeltas(4, "cpu")
    scheduler.kv_compression.positions.set(2, 10)
    batch = SimpleNamespace(
        forward_mode=forward_mode(mode),
        positions=torch.tensor([3, 4]),
        req_pool_indices=torch.tensor([2, 1]),
    )
    assert hook_on(seams.POSITIONS)(batch, "batch", model_runner="runner") is None
    assert batch.positions.tolist() == expected


def test_positions_are_left_alone_while_the_engine_warms_up(scheduler: Any) -> None:
    batch = SimpleNamespace(forward_mode=forward_mode("decode"), positions="untouched")
    hook_on(seams.POSITIONS)(batch)
    assert batch.positions == "untouched"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_both_log_lines_carry_our_parts(scheduler: Any, phase: str) -> None:
    stats = PoolStats(
        full_num_used=10, full_token_usage=0.1, full_available_size=80, full_evictable_size=10
    )
    parts = getattr(stats, f"get_{phase}_usage_msg_parts")()
    assert parts[-2:] == ["#kv-comp-req: 2", "kv-comp slots saved: 30"]
    assert len(parts) > 2 and "token usage" in " ".join(parts)
