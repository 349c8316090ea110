# SPDX-License-Identifier: Apache-2.0
"""From the launch of a prefill to the compressed request: order, lengths, outcomes, streams."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers import compressor
from lava_sglang.managers.compression_state import SkipReason
from lava_sglang.managers.forward_stream import ForwardStream
from lava_sglang.mem_cache.host_tape import HostTape
from lava_sglang.methods import METHODS
from lava_sglang.policy import method_of
from tests.contract.engine import CONFIG, Engine, build_engine

pytestmark = pytest.mark.usefixtures("runtime_context")

SNAPKV = CONFIG.model_copy(update={"method": "snapkv"})


@pytest.fixture(params=[1, 16], ids="page {}".format)
def engine(request: pytest.FixtureRequest) -> Engine:
    return build_engine(request.param)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0.25, (0.5, 0.25)])
def test_warming_up_writes_to_the_padding_only(
    method: str, budget: float | tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It launches a compression, and with a ladder a trim."""
    if method == "streamingllm":
        budget = 0.25  # takes no ladder
    launched = []
    for name in ("compact", "trim"):
        run = getattr(compressor, name)
        monkeypatch.setattr(
            compressor, name, lambda *args, n=name, r=run: (launched.append(n), r(*args))
        )
    config = KVCompressionConfig(method=method, window_size=4, budget=budget)
    engine = build_engine(1, config=config)
    req = engine.request(range(1, 60), CONFIG.model_copy(update={"method": "snapkv"}))
    assert engine.admit(req)
    engine.extend((req, None))
    arena, offsets = engine.pool.arena.clone(), engine.tape.offsets.clone()
    launched.clear()
    engine.coordinator.compressor.warm_up(config)
    assert launched == ["compact"] + ["trim"] * config.has_ladder
    assert torch.equal(engine.pool.arena[:, :, 1:], arena[:, :, 1:])
    assert torch.equal(engine.tape.offsets, offsets)
    engine.check()


def test_a_finished_prefill_is_compressed_counted_and_lets_its_window_go(engine: Engine) -> None:
    req = engine.request(range(1, 113), SNAPKV)
    assert engine.admit(req)
    engine.extend((req, 80))
    assert req.plan is not None and req.window is not None and not req.compressed
    assert engine.coordinator.stats.requests.total() == 0
    engine.extend((req, None))
    assert req.compressed and req.window is None
    assert engine.coordinator.capture.segments == []
    assert dict(engine.coordinator.stats.requests) == {"compressed": 1}
    plan = req.plan
    assert req.budget == plan.rungs[0]
    assert engine.tape.position_deltas[req.kv.req_pool_idx] == 112 - req.budget
    assert len(engine.coordinator.seconds()) == 1


def test_the_forward_pass_in_flight_keeps_its_lengths(engine: Engine) -> None:
    """SGLang's ForwardBatch holds the batch's tensors: new ones are bound, none is written."""
    reqs = [engine.request(range(start, start + 90)) for start in (1, 1000)]
    reqs[1].sampling_params.max_new_tokens = 1
    for req in reqs:
        assert engine.admit(req)
    batch = engine.extend(*[(req, None) for req in reqs], process=False)
    in_flight = batch.seq_lens, batch.seq_lens_cpu
    engine.coordinator.end_extend(batch)
    assert [lengths.tolist() for lengths in in_flight] == [[90, 90]] * 2
    assert reqs[0].plan is not None and reqs[1].plan is None
    compressed_len = reqs[0].budget
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [compressed_len, 90]
    assert batch.seq_lens.dtype == in_flight[0].dtype and batch.seq_lens_sum is None


def test_nothing_compressed_leaves_the_batch_alone(engine: Engine) -> None:
    req = engine.request(range(1, 10))
    assert engine.admit(req)
    batch = engine.extend((req, None), process=False)
    before = batch.seq_lens, batch.seq_lens_cpu, batch.seq_lens_sum
    engine.coordinator.end_extend(batch)
    assert (batch.seq_lens is before[0], batch.seq_lens_cpu is before[1]) == (True, True)
    assert batch.seq_lens_sum == before[2]
    assert dict(engine.coordinator.stats.requests) == {"too_short": 1}


def test_a_row_that_is_used_again_starts_without_a_delta(engine: Engine) -> None:
    first = engine.request(range(1, 113))
    assert engine.admit(first)
    engine.extend((first, None))
    row = first.kv.req_pool_idx
    engine.finish(first)
    second = engine.request(range(500, 510))
    assert engine.admit(second)
    engine.extend((second, None))
    assert second.kv.req_pool_idx == row and not second.compressed
    assert engine.tape.position_deltas.sum() == engine.tape.budgets.sum() == 0
    engine.decode()
    engine.check()


def test_rows_without_a_prefill_start_without_a_tape() -> None:
    """A beam's members get rows that compressed requests had, and SGLang prefills none of them."""
    engine = build_engine()
    engine.tape.host = HostTape()
    first = [engine.request(range(1000 * i + 1, 1000 * i + 113)) for i in range(4)]
    for req in first:
        assert engine.admit(req)
    engine.extend(*[(req, None) for req in first])
    rows = [req.kv.req_pool_idx for req in first]
    assert engine.tape.budgets[rows].all() and engine.tape.position_deltas[rows].all()
    for req in first[:3]:
        engine.finish(req)
    members = engine.rows.alloc_rows(3)
    assert members is not None and set(members) == set(rows[:3])
    for table in (engine.tape.budgets, engine.tape.prefix_lens, engine.tape.position_deltas):
        assert table[members].tolist() == [0, 0, 0]
    assert engine.tape.host.pieces(members) == [None] * 3
    for row in members:
        engine.tape.check_integrity(row)
    engine.rows.free_rows(members)
    engine.check()


def test_rows_are_reset_on_the_stream_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in flight may read them for their owners before."""
    engine = build_engine()
    scheduler = Recorder(True, "cuda")
    engine.coordinator.compressor.stream = ForwardStream(scheduler)
    monkeypatch.setattr(engine.tape, "reset", lambda rows: scheduler.calls.append(f"reset {rows}"))
    rows = engine.rows.alloc_rows(2)
    assert scheduler.calls == ["enter", "forward waits for schedule", f"reset {rows}", "exit"]


def test_a_chunk_and_a_retraction_keep_or_reset_the_row(engine: Engine) -> None:
    """A row has one owner from its first chunk on; who comes back after a retraction is new."""
    seen: list[list[int]] = []
    reset = engine.tape.reset
    engine.tape.reset = lambda rows: (seen.append(rows), reset(rows))[1]  # type: ignore[method-assign]
    req = engine.request(range(1, 113))
    assert engine.admit(req)
    engine.extend((req, 64))
    engine.extend((req, None))
    row = req.kv.req_pool_idx
    assert req.compressed and seen == [[row]]
    engine.retract(req)
    assert engine.admit(req)
    engine.extend((req, 64))
    assert seen == [[row], [req.kv.req_pool_idx]]
    engine.check()


def test_a_method_without_queries_stashes_none(engine: Engine) -> None:
    req = engine.request(range(1, 113))
    assert engine.admit(req)
    engine.extend((req, 110), process=False)
    assert req.plan is not None and req.window is None
    assert engine.coordinator.capture.segments == []


def test_a_backend_that_hands_over_nothing_leaves_the_request_uncompressed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine.coordinator.capture, "capture", lambda layer, queries: None)
    req = engine.request(range(1, 113), SNAPKV)
    assert engine.admit(req)
    engine.extend((req, None))
    assert (req.compressed, req.skip_reason) == (False, SkipReason.NO_QUERIES)
    assert req.rid in caplog.text and "no window queries" in caplog.text
    engine.check()


def test_a_request_that_was_aborted_before_its_last_chunk_is_not_compressed(
    engine: Engine,
) -> None:
    req = engine.request(range(1, 113), SNAPKV)
    assert engine.admit(req)
    engine.extend((req, 64))
    req.to_finish = FINISH_ABORT("gone")
    engine.extend((req, None))
    assert (req.compressed, req.plan, req.skip_reason) == (False, None, SkipReason.ABORTED)
    assert dict(engine.coordinator.stats.requests) == {"aborted": 1}
    engine.check()


def test_a_request_that_is_retracted_in_its_prefill_starts_over(engine: Engine) -> None:
    req = engine.request(range(1, 113), SNAPKV)
    assert engine.admit(req)
    engine.extend((req, 64))
    engine.retract(req)
    engine.check()
    assert req.window is None and req.plan is None
    assert engine.admit(req)
    engine.extend((req, None))
    assert req.compressed and req.plan is not None
    assert req.plan.shared_prefix_len == 0  # its own first chunk is no shared prefix
    engine.check()


def test_requests_of_one_batch_have_their_own_methods(engine: Engine) -> None:
    methods = ("snapkv", "streamingllm", "lava")
    reqs = [
        engine.request(
            range(1000 * i + 1, 1000 * i + 100),
            CONFIG.model_copy(update={"method": "adakv"}),
            custom_params={"kv_compression": {"method": method, "budget": 0.2 + 0.1 * i}},
        )
        for i, method in enumerate(methods)
    ]
    for req in reqs:
        assert engine.admit(req)
    engine.extend(*[(req, None) for req in reqs])
    assert [req.info()["method"] for req in reqs] == list(methods)
    assert len({req.info()["kept_tokens"] for req in reqs}) == (
        3 if engine.tree.page_size == 1 else 2
    )
    engine.check()


def test_a_neighbour_is_not_touched(engine: Engine) -> None:
    """No other request's row, lengths or entries change when one is compressed."""
    quiet = engine.request(range(1, 100), custom_params={"kv_compression": {"enabled": False}})
    assert engine.admit(quiet)
    engine.extend((quiet, None))
    row, length = engine.row(quiet).tolist(), quiet.kv.kv_committed_len
    loud = engine.request([*range(1, 60), *range(700, 760)])
    assert engine.admit(loud)
    engine.extend((loud, None))
    assert loud.compressed
    assert (engine.row(quiet).tolist(), quiet.kv.kv_committed_len) == (row, length)
    engine.check()


def test_a_method_is_made_once() -> None:
    assert method_of(SNAPKV) is method_of(SNAPKV.model_copy())
    assert method_of(SNAPKV) is not method_of(CONFIG)


class Recorder:
    """A scheduler of a device with overlap: what is asked of its streams, in order."""

    def __init__(self, overlap: bool, device: str) -> None:
        self.enable_overlap, self.device = overlap, device
        self.calls: list[str] = []
        self.schedule_stream = Stream("schedule", self.calls)
        self.forward_stream = Stream("forward", self.calls)
        self.current = self.schedule_stream
        self.device_module = SimpleNamespace(stream=partial(StreamContext, self))


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: "Stream") -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


class StreamContext:
    """As torch's: what it goes back to is what was current when it was entered last."""

    def __init__(self, recorder: Recorder, stream: Stream) -> None:
        self.recorder, self.stream = recorder, stream

    def __enter__(self) -> None:
        self.before, self.recorder.current = self.recorder.current, self.stream
        self.recorder.calls.append("enter")

    def __exit__(self, *exc: Any) -> None:
        self.recorder.current = self.before
        self.recorder.calls.append("exit")


class Tensor:
    def __init__(self) -> None:
        self.streams: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


def test_with_overlap_work_goes_behind_the_forward_pass() -> None:
    scheduler = Recorder(True, "cuda")
    tensor: Any = Tensor()
    stream = ForwardStream(scheduler)
    with stream:
        scheduler.calls.append("work")
    stream.keep_alive(tensor)
    stream.fence_row_writes()
    assert scheduler.calls == [
        "enter",
        "forward waits for schedule",
        "work",
        "exit",
        "schedule waits for forward",
    ]
    assert tensor.streams == [scheduler.forward_stream]


@pytest.mark.parametrize(("overlap", "device"), [(False, "cuda"), (True, "cpu"), (False, "cpu")])
def test_with_one_queue_nothing_is_ordered(overlap: bool, device: str) -> None:
    scheduler = Recorder(overlap, device)
    stream = ForwardStream(scheduler)
    with stream:
        stream.keep_alive(torch.zeros(1))
        stream.fence_row_writes()
    assert scheduler.calls == []


def test_it_may_be_entered_on_the_stream_of_the_forward_pass() -> None:
    """SGLang takes a beam's rows there; its own context would forget the way back."""
    scheduler = Recorder(True, "cuda")
    stream = ForwardStream(scheduler)
    with stream:
        with stream:
            assert scheduler.current is scheduler.forward_stream
        assert scheduler.current is scheduler.forward_stream
    assert scheduler.current is scheduler.schedule_stream


def test_an_error_under_the_stream_is_not_swallowed() -> None:
    scheduler = Recorder(True, "cuda")
    with pytest.raises(KeyError), ForwardStream(scheduler):
        raise KeyError("inside")
    assert scheduler.calls[-1] == "exit"
