# SPDX-License-Identifier: Apache-2.0
"""The scheduler's extension points: called in order, with what SGLang expects of them."""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from lava_sglang.config import KVCompressionConfig
from lava_sglang.integration.scheduler import LavaScheduler
from lava_sglang.layer_map import LayerMap
from lava_sglang.managers.output_streamer import LavaOutputStreamer
from lava_sglang.managers.prefill_adder import LavaPrefillAdder
from lava_sglang.managers.request import LavaReq
from tests.contract.engine import build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

CONFIG = KVCompressionConfig(method="random", min_tokens=10, scope="suffix")


def stock() -> Any:
    """SGLang's own class. Not by a name in this module: the plugin puts ours behind each."""
    return LavaScheduler.__mro__[1]


class Prometheus:
    def __init__(self) -> None:
        self.observed: list[tuple[tuple[int, int], list[float]]] = []

    def observe(self, running: tuple[int, int], seconds: list[float]) -> None:
        self.observed.append((running, list(seconds)))


@pytest.fixture
def scheduler() -> Any:
    """Ours, before SGLang has built anything in it."""
    made = LavaScheduler.__new__(LavaScheduler, SimpleNamespace(kv_compression="random"))
    made.kv_compression_config = CONFIG
    made.kv_compression = build_engine(config=CONFIG).coordinator
    made.page_size = 16
    made.prefill_decode_interval = 3
    made.running_batch = SimpleNamespace(reqs=[])
    model = SimpleNamespace(kv_compression=SimpleNamespace(layers=LayerMap.plain(2)))
    made.tp_worker = SimpleNamespace(model_runner=model)
    return made


def running(freed: int) -> Any:
    return SimpleNamespace(compressed=True, slots_freed=freed)


def test_a_request_is_ours_with_the_servers_settings(scheduler: Any) -> None:
    req = scheduler._create_generation_req(
        "recv_req", "rid", "", array("q", range(40)), SamplingParams(), vocab_size=100, stream=True
    )
    assert type(req) is LavaReq
    assert (req.rid, req.stream, req.compression, req.page_size) == ("rid", True, CONFIG, 16)


def test_a_request_of_few_arguments_is_ours_too(scheduler: Any) -> None:
    """As SGLang builds one to answer for a session that does not exist."""
    req = scheduler._create_generation_req(
        "recv_req", "rid", "", array("q", [1]), SamplingParams(), vocab_size=9, http_worker_ipc=None
    )
    assert req.info()["reason"] == "not_prefilled"


@pytest.fixture
def calls(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> str:
        seen.append(f"run {args} {kwargs}")
        return "result"

    monkeypatch.setattr(stock(), "run_batch", run_batch)
    coordinator = scheduler.kv_compression
    monkeypatch.setattr(coordinator, "begin_extend", lambda batch: seen.append("begin_extend"))
    monkeypatch.setattr(
        coordinator, "end_extend", lambda batch: seen.append("end_extend") or batch.compresses
    )
    return seen


def batch_of(mode: str, compresses: bool = False) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: mode == "extend"),
        compresses=compresses,
        batch_is_full=True,
    )


def test_a_prefill_is_compressed_when_it_has_been_launched(
    scheduler: Any, calls: list[str]
) -> None:
    assert scheduler.run_batch(batch_of("extend"), pp_proxy_tensors=None) == "result"
    assert calls == ["begin_extend", "run () {'pp_proxy_tensors': None}", "end_extend"]


def test_a_decode_runs_as_it_is(scheduler: Any, calls: list[str]) -> None:
    assert scheduler.run_batch(batch_of("decode")) == "result"
    assert calls == ["run () {}"]


@pytest.mark.parametrize("compresses", [True, False])
def test_freed_slots_open_admission_again(
    scheduler: Any, calls: list[str], compresses: bool
) -> None:
    """SGLang marks a batch as full, and asks again only when a request leaves."""
    scheduler.running_batch.batch_is_full = True
    batch = batch_of("extend", compresses)
    scheduler.run_batch(batch)
    assert batch.batch_is_full is not compresses
    assert scheduler.running_batch.batch_is_full is not compresses


@pytest.mark.parametrize("freed", [True, False])
def test_slots_freed_before_a_decode_open_admission_again(
    scheduler: Any, freed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a trim, a first copy or the compression of a long answer."""
    monkeypatch.setattr(stock(), "update_running_batch", lambda self, batch: batch)
    monkeypatch.setattr(scheduler.kv_compression, "before_decode", lambda batch: freed)
    batch = scheduler.running_batch = batch_of("decode")
    assert scheduler.update_running_batch(batch) is batch
    assert batch.batch_is_full is not freed


def test_sglang_gets_our_classes(scheduler: Any) -> None:
    adder = scheduler.get_prefill_adder_class()
    assert adder.func is LavaPrefillAdder
    assert adder.keywords == {"coordinator": scheduler.kv_compression, "decode_steps": 3}
    assert scheduler.get_output_streamer_class() is LavaOutputStreamer
    assert issubclass(LavaPrefillAdder, stock().get_prefill_adder_class(scheduler))
    assert issubclass(LavaOutputStreamer, stock().get_output_streamer_class(scheduler))


def test_the_log_parts_tell_what_runs(scheduler: Any) -> None:
    assert scheduler.add_log_parts([]) == ["#kv-comp-req: 0", "kv-comp slots saved: 0"]
    plain = SimpleNamespace(compressed=False, plan=None)
    scheduler.running_batch.reqs = [running(300), plain, running(50)]
    assert scheduler.add_log_parts([]) == ["#kv-comp-req: 2", "kv-comp slots saved: 350"]


def test_prometheus_is_told_with_the_log_line(scheduler: Any) -> None:
    series = scheduler.kv_compression.stats.prometheus = Prometheus()
    scheduler.running_batch.reqs = [running(300)]
    with scheduler.kv_compression.compressor.timer:
        pass
    scheduler.add_log_parts([])
    scheduler.add_log_parts([])
    assert [totals for totals, _ in series.observed] == [(1, 300)] * 2
    assert [len(seconds) for _, seconds in series.observed] == [1, 0]


def test_gauges_go_back_to_zero_when_the_server_is_idle(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle: list[str] = []
    monkeypatch.setattr(stock(), "on_idle", lambda self: idle.append("stock"))
    series = scheduler.kv_compression.stats.prometheus = Prometheus()
    scheduler.on_idle()
    assert idle == ["stock"]
    assert [totals for totals, _ in series.observed] == [(0, 0)]


def test_times_do_not_pile_up_where_nobody_reads_them(scheduler: Any) -> None:
    """Without `--enable-metrics`, and on ranks that do not log."""
    for _ in range(3000):
        with scheduler.kv_compression.compressor.timer:
            pass
    assert len(scheduler.kv_compression.compressor.timer.pending) <= 1024
    scheduler.add_log_parts([])
    assert not scheduler.kv_compression.compressor.timer.pending


def test_server_info_carries_the_totals(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = SimpleNamespace(internal_state={"stock": 1})
    monkeypatch.setattr(stock(), "get_internal_state", lambda self, recv_req: reply)
    scheduler.running_batch.reqs = [running(300)]
    scheduler.tree_cache = SimpleNamespace(evictable_size=lambda: 7)
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(size=100, available_size=lambda: 20)
    assert scheduler.get_internal_state("recv_req") is reply
    assert reply.internal_state["stock"] == 1
    stats = reply.internal_state["kv_compression_stats"]
    assert stats["dp_rank"] == 0
    assert stats["running_compressed_requests"] == 1 and stats["running_slots_saved"] == 300
    assert (stats["pool_slots"], stats["free_slots"], stats["evictable_slots"]) == (100, 20, 7)
