# SPDX-License-Identifier: Apache-2.0
"""The installed wrapper's own planning and checks, with a stand-in for its compiled modules only.

The stand-in is handed what the CUDA code would be handed, and computes it in torch.
"""

from types import SimpleNamespace
from typing import Any

import flashinfer
import pytest
import torch

from lava_sglang.kernels import flashinfer_decode
from lava_sglang.kernels.flashinfer_decode import FlashInferDecode
from lava_sglang.kernels.reference import ragged_decode_ref
from tests.kernels import flashinfer_model
from tests.kernels.tape_batch import Request, TapeBatch, tape_batch

REQUESTS = [Request(37, 11, 5), Request(0, 0, 7), Request(0, 9, 1, "last"), Request(3, 8, 3)]
PLAN = ["float", "int", "pinned"]
CUDA_CORES = [*PLAN, "indptr", "batch_size", "num_qo_heads", "num_kv_heads", "page_size", "graph"]
TENSOR_CORES = [*PLAN, "qo_indptr", "indptr", "kv_lens", "total_rows", "batch_size"]
TENSOR_CORES += ["num_qo_heads", "num_kv_heads", "page_size", "graph"]


class CompiledModule:
    """`plan` and `run` of a decode module, by position as the wrapper calls them."""

    def __init__(self, plan_names: list[str]):
        self.plan_names = plan_names
        self.plans: list[dict[str, Any]] = []

    def plan(self, *args: Any) -> int:
        """Returns which plan it is, in the place of offsets into the workspace."""
        self.plans.append(dict(zip(self.plan_names, args, strict=False)))
        assert self.plans[-1]["indptr"].device.type == "cpu"
        assert self.plans[-1]["indptr"].dtype == torch.int32
        return len(self.plans) - 1

    def run(self, *args: Any) -> None:
        self._attend(*args[2:11], sm_scale=args[16])

    def paged_run(self, *args: Any) -> None:
        assert torch.equal(args[6], torch.arange(len(args[3]) + 1))
        self._attend(*args[2:6], *args[7:12], sm_scale=args[23])

    def _attend(
        self, number: int, q: Any, k: Any, v: Any, indptr: Any, indices: Any, last: Any,
        out: torch.Tensor, lse: torch.Tensor, sm_scale: float,
    ) -> None:  # fmt: skip
        planned = self.plans[number]
        assert torch.equal(planned["indptr"], indptr) and planned["batch_size"] == len(q)
        assert planned["graph"] is False
        model = flashinfer_model.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(1), "NHD", True)
        model.plan(
            indptr, indices, last, planned["num_qo_heads"], planned["num_kv_heads"], q.shape[2],
            planned["page_size"], q_data_type=q.dtype, kv_data_type=k.dtype, sm_scale=sm_scale,
        )  # fmt: skip
        result, states = model.run(q, (k, v), return_lse=True)
        out.copy_(result)
        lse.copy_(states)


@pytest.fixture(params=[2, 4], ids=["CUDA cores", "tensor cores"])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TapeBatch:
    """Of 2 or 4 query heads per KV head, which decide by what FlashInfer decodes."""
    empty = torch.empty
    # No driver, no pinned memory.
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs)
    )
    monkeypatch.setattr(flashinfer_decode, "FLOAT_WORKSPACE", 2**16)

    def module(names: list[str], *signature: Any) -> CompiledModule:
        backend = ("fa2",) if names is TENSOR_CORES else ()
        dtypes = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
        no_fp16_qk = (False,) if names is TENSOR_CORES else ()
        # What `flashinfer_module` compiles: head dims, no RoPE, no window, no cap.
        assert signature == (*backend, *dtypes, 64, 64, 0, False, False, *no_fp16_qk)
        return made.setdefault(id(names), CompiledModule(names))

    made: dict[int, CompiledModule] = {}
    for name, names in (
        ("get_batch_decode_module", CUDA_CORES),
        ("get_batch_prefill_module", TENSOR_CORES),
    ):
        monkeypatch.setattr(
            flashinfer.decode, name, lambda *args, names=names: module(names, *args)
        )
    merge = SimpleNamespace(merge_state_in_place=flashinfer_model.merge_state_in_place)
    monkeypatch.setattr(flashinfer.cascade, "get_cascade_module", lambda: merge)
    return tape_batch(REQUESTS, group=request.param, dtype=torch.bfloat16, padding_rows=1)


def test_the_installed_wrapper_decodes_over_the_tape(batch: TapeBatch) -> None:
    decode = FlashInferDecode(
        flashinfer, batch.arena, batch.q.shape[1], len(batch.q), batch.scaling
    )
    decode.warm_up()
    rows = batch.req_pool_indices
    budgets = batch.budgets[rows]
    tables = batch.tables()
    decode.plan_tape(tables, batch.offsets[rows] * (budgets > 0)[:, None].int())
    for shorter in (1, 0):  # two steps over one plan of the tape
        lengths = batch.seq_lens - shorter * (batch.seq_lens > 20)
        decode.plan_exact(tables, lengths - budgets)
        for layer in range(len(batch.arena)):
            want = ragged_decode_ref(
                batch.q, batch.arena, layer, batch.tables()._replace(seq_lens=lengths),
                batch.scaling,
            )  # fmt: skip
            got = decode.run(batch.q, layer)
            torch.testing.assert_close(got, want, rtol=0, atol=1.6e-2)
