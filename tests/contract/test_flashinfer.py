# SPDX-License-Identifier: Apache-2.0
"""Decode by FlashInfer: what the installed package takes, and our backend in SGLang's memory.

Its kernels do not run here: a torch model of them stands in the module's place.
"""

import inspect
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashinfer
import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from lava_sglang.attention.flashinfer import LavaFlashInferAttnBackend
from lava_sglang.attention.query_capture import attach_tape
from lava_sglang.config import KVCompressionConfig
from lava_sglang.config import KVCompressionError as Refused
from lava_sglang.integration import refusals
from lava_sglang.kernels import flashinfer_decode
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.flashinfer_decode import CALLS, MERGE, WRAPPER
from lava_sglang.kernels.reference import ragged_decode_ref
from lava_sglang.managers.request import LavaReq
from lava_sglang.methods import RAGGED_METHODS, UNIFORM_METHODS
from tests.contract import engine as engine_module
from tests.contract.engine import (
    KV_HEADS,
    NUM_LAYERS,
    QUERY_HEADS,
    SCALING,
    Engine,
    build_engine,
    running_batch,
)
from tests.kernels.flashinfer_model import FLASHINFER

OPTION = "--kv-compression-config decode_kernel='flashinfer'"
RAGGED = KVCompressionConfig(
    method="lava", min_tokens=16, window_size=4, scope="suffix", decode_kernel="flashinfer"
)
LADDER = RAGGED.model_copy(update={"budget": (0.75, 0.5, 0.25)})
HEADERS = Path(flashinfer.__file__).parent / "data" / "include" / "flashinfer"


def reasons(device: str = "cuda", method: str = "lava") -> list[str]:
    config = KVCompressionConfig(method=method, decode_kernel="flashinfer")
    return refusals.flashinfer_reasons(config, device)


@pytest.mark.parametrize("method", RAGGED_METHODS)
def test_the_installed_flashinfer_takes_our_calls(method: str) -> None:
    assert reasons(method=method) == []


@pytest.mark.parametrize("target", CALLS)
def test_the_model_takes_what_the_installed_one_takes(target: str) -> None:
    """The same names in the same kinds and with the same defaults, and just those that we name."""
    installed = inspect.signature(attrgetter(target)(flashinfer)).parameters
    model = dict(inspect.signature(attrgetter(target)(FLASHINFER)).parameters)
    if target.endswith(".plan"):
        assert model.pop("kwargs").kind is inspect.Parameter.VAR_KEYWORD
        assert "kwargs" in installed
    assert set(model) == set(CALLS[target])
    for name, parameter in model.items():
        theirs = installed[name]
        assert parameter.kind is theirs.kind, name
        default = {torch.float16: "float16"}.get(parameter.default, parameter.default)
        assert default == theirs.default, name


@pytest.mark.parametrize(
    ("header", "text"),
    [
        # The product of page index and stride is 64 bits wide.
        ("page.cuh", "size_t get_elem_offset(size_t page_idx, size_t head_idx,"),
        ("page.cuh", "return page_idx * stride_page + head_idx * stride_h"),
        # What `run` returns is what the merge takes.
        ("attention/state.cuh", "return m + math::ptx_log2(d);"),
        ("attention/cascade.cuh", "Both s and s_other are logsumexp values with base 2"),
        # Each state by its own share, a small one too.
        ("attention/cascade.cuh", "float other_scale = (d_sum > 0.f) ? s_other_val / d_sum : 0.f"),
        # The mask is read byte by byte.
        ("attention/cascade.cuh", "if (mask != nullptr && mask[pos] == 0) return;"),
    ],
)
def test_what_we_rely_on_is_in_the_installed_source(header: str, text: str) -> None:
    assert text in (HEADERS / header).read_text()


def test_a_changed_call_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, MERGE, lambda v, s, v_other, s_other: None)
    (reason,) = reasons()
    assert reason.startswith(f"{OPTION}: flashinfer.{MERGE} takes ('v', 's', 'v_other', 's_other')")
    assert "mask" in reason


def test_a_new_required_argument_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = getattr(flashinfer, WRAPPER)
    monkeypatch.setattr(wrapper, "run", lambda self, q, paged_kv_cache, sinks, return_lse: None)
    (reason,) = reasons()
    assert f"flashinfer.{WRAPPER}.run takes" in reason and "'sinks'" in reason


def test_what_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(getattr(flashinfer, WRAPPER), "_plan_impl")
    (reason,) = reasons()
    assert reason.startswith(f"{OPTION}: flashinfer.{WRAPPER}._plan_impl is missing: ")


def test_without_flashinfer_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    (reason,) = reasons()
    assert reason.startswith(f"{OPTION}: FlashInfer cannot be imported: ")


@pytest.mark.parametrize("device", ["cpu", "xpu", "npu"])
def test_on_another_device_it_is_refused(device: str) -> None:
    assert reasons(device) == [f"{OPTION}: needs an NVIDIA GPU, this server runs on {device}"]


def test_on_an_amd_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose device is called cuda."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reasons() == [f"{OPTION}: needs an NVIDIA GPU, this server runs on ROCm"]


@pytest.mark.parametrize("method", UNIFORM_METHODS)
def test_a_uniform_method_does_not_use_it(method: str) -> None:
    (reason,) = reasons(method=method)
    assert reason.startswith(
        f"{OPTION}: of use to lava, lava_span, adakv, pyramidkv only; {method} decodes"
    )


@pytest.fixture
def engine(runtime_context: None, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """SGLang's memory with heads as wide as a kernel takes, and the model as the module."""
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)
    monkeypatch.setattr(engine_module, "HEAD_DIM", 16)
    monkeypatch.setattr(flashinfer_decode, "HEAD_DIMS", (16,))
    monkeypatch.setattr(flashinfer_decode, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer_decode, "FLOAT_WORKSPACE", 2**16)
    return build_engine(config=LADDER)


def runner_of(engine: Engine, scales: tuple[float, ...] = (SCALING,) * NUM_LAYERS) -> Any:
    layers = [
        RadixAttention(QUERY_HEADS, engine_module.HEAD_DIM, scale, KV_HEADS, i)
        for i, scale in enumerate(scales)
    ]
    return SimpleNamespace(
        model=nn.ModuleList(layers),
        model_config=SimpleNamespace(num_attention_heads=QUERY_HEADS),
        tp_size=1,
        req_to_token_pool=engine.rows,
        token_to_kv_pool=engine.pool,
    )


def attached(engine: Engine) -> tuple[LavaFlashInferAttnBackend, Any]:
    runner = runner_of(engine)
    backend = LavaFlashInferAttnBackend(runner)
    attach_tape(backend, engine.model)
    return backend, runner.model


def check_step(engine: Engine, backend: LavaFlashInferAttnBackend, model: Any) -> None:
    """All layers of a step, as SGLang calls them, against the reference over the tables."""
    rows = torch.tensor([req.kv.req_pool_idx for req in engine.decoding])
    lengths = torch.tensor([req.kv.kv_committed_len for req in engine.decoding])
    batch = SimpleNamespace(
        req_pool_indices=rows, req_pool_indices_cpu=rows, seq_lens=lengths, seq_lens_cpu=lengths
    )
    backend.init_forward_metadata(batch)
    tape = engine.tape
    for layer in model:
        q = torch.randn(len(rows), QUERY_HEADS * engine_module.HEAD_DIM)
        want = ragged_decode_ref(
            q.view(len(rows), QUERY_HEADS, -1), engine.pool.arena, layer.layer_id,
            BatchTables(
                engine.rows.req_to_token, rows, lengths, tape.prefix_lens, tape.budgets,
                tape.offsets,
            ),
            SCALING,
        )  # fmt: skip
        got = backend.forward_decode(q, None, None, layer, batch)
        torch.testing.assert_close(got, want.flatten(1), rtol=1e-4, atol=1e-4)


def prefilled(
    engine: Engine, first: int, count: int, config: KVCompressionConfig = RAGGED
) -> LavaReq:
    req = engine.request(range(first, first + count), config)
    assert engine.admit(req)
    engine.extend((req, None))
    return req


def test_requests_come_and_go(engine: Engine) -> None:
    """Joined, decoded, finished, a row used again, retracted: each step equals the reference."""
    backend, model = attached(engine)
    tape_plans = [wrapper.plans for wrapper in backend.decode.tape]

    def step(changed: bool) -> None:
        engine.decode()
        check_step(engine, backend, model)
        for layer, wrapper in enumerate(backend.decode.tape):
            tape_plans[layer] += changed
            assert wrapper.plans == tape_plans[layer]
        engine.check()

    long = prefilled(engine, 1000, 60)
    assert long.compressed
    step(changed=True)
    step(changed=False)
    short = prefilled(engine, 2000, 9)
    assert not short.compressed
    step(changed=True)
    shared = prefilled(engine, 1000, 90)  # a prefix that the tree has
    assert shared.compressed and shared.plan is not None and shared.plan.shared_prefix_len > 0
    step(changed=True)
    step(changed=False)
    row = long.kv.req_pool_idx
    engine.finish(long)
    again = prefilled(engine, 5000, 12)
    assert again.kv.req_pool_idx == row and not again.compressed
    step(changed=True)
    engine.retract(shared)
    step(changed=False)  # none is compressed: FlashInfer reads rows as SGLang wrote them
    assert backend.decode.tape_lens == [0] * NUM_LAYERS


def test_a_trim_is_a_change_of_the_batch(engine: Engine) -> None:
    """Down two rungs between steps: shorter pieces, in fewer slots of the same row."""
    backend, model = attached(engine)
    beside = prefilled(engine, 5000, 40)
    req = prefilled(engine, 1000, 130, LADDER)
    assert beside.compressed and req.plan is not None and len(req.plan.rungs) == 3
    for rung in req.plan.rungs:
        engine.coordinator.make_room(running_batch(engine), lambda rung=rung: req.budget == rung)
        assert req.budget == rung
        for changed in (True, False):
            before = [wrapper.plans for wrapper in backend.decode.tape]
            engine.decode()
            check_step(engine, backend, model)
            assert [w.plans - changed for w in backend.decode.tape] == before
        engine.check()


def test_a_batch_of_sglangs_own_at_start_is_planned(engine: Engine) -> None:
    backend, _ = attached(engine)
    rows, lengths = torch.tensor([0, 0]), torch.tensor([1, 1])
    batch = SimpleNamespace(
        req_pool_indices=rows, req_pool_indices_cpu=None, seq_lens=lengths, seq_lens_cpu=lengths
    )
    backend.init_forward_metadata(batch)
    assert backend.planned == [None, None]


def test_new_entries_are_written_before_they_are_read(engine: Engine) -> None:
    backend, model = attached(engine)
    req = prefilled(engine, 1000, 60)
    engine.decode()
    slot = engine.row(req)[-1:]
    rows, lengths = torch.tensor([req.kv.req_pool_idx]), torch.tensor([req.kv.kv_committed_len])
    batch = SimpleNamespace(
        req_pool_indices=rows, req_pool_indices_cpu=rows, seq_lens=lengths, seq_lens_cpu=lengths,
        out_cache_loc=slot,
    )  # fmt: skip
    written: list[Any] = []
    backend.save = lambda *args: written.append(args)  # type: ignore[method-assign]
    backend.init_forward_metadata(batch)
    width = engine_module.HEAD_DIM
    q, k = torch.zeros(1, QUERY_HEADS * width), torch.ones(1, KV_HEADS * width)
    assert backend.forward_decode(q, k, k, model[0], batch).shape == q.shape
    assert written == [(model[0], batch, k, k, True)]


def test_no_graph_of_decode_is_captured(engine: Engine) -> None:
    backend, _ = attached(engine)
    with pytest.raises(NotImplementedError, match="disable-decode-cuda-graph"):
        backend.init_cuda_graph_state(8, 8)


def test_it_is_given_no_prefill(engine: Engine) -> None:
    backend, _ = attached(engine)
    with pytest.raises(NotImplementedError, match="--prefill-attention-backend"):
        backend.forward_extend()


def test_what_it_does_not_take_is_refused_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_decode, "HEAD_DIMS", (64,))
    monkeypatch.setattr(flashinfer_decode, "DTYPES", (torch.bfloat16,))
    with pytest.raises(Refused) as caught:
        LavaFlashInferAttnBackend(runner_of(engine, (0.5, 0.25)))
    entries, width, scales = caught.value.reasons
    assert entries.startswith("KV entries of torch.float32")
    assert width == "head_dim=16: FlashInfer decode accepts 64"
    assert scales == "attention scales [0.25, 0.5]: FlashInfer decode accepts one for a model"
