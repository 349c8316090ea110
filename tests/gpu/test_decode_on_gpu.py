# SPDX-License-Identifier: Apache-2.0
"""Decode over the tape in a captured CUDA graph, and by FlashInfer's own kernels."""

from __future__ import annotations

import importlib

import pytest
import torch

from lava_sglang.kernels.flashinfer_decode import HEAD_DIMS, FlashInferDecode
from lava_sglang.kernels.ragged_decode import DecodeWorkspace, ragged_decode
from lava_sglang.kernels.reference import ragged_decode_ref
from tests.kernels.tape_batch import Request, TapeBatch, tape_batch

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIXED = [
    Request(prefix=37, budget=110, tail=5),
    Request(prefix=0, budget=0, tail=700),
    Request(prefix=0, budget=33, tail=1, cut="last"),
    Request(prefix=3, budget=32, tail=33, cut="even"),
    Request(prefix=7, budget=2000, tail=9),
]


def batch_on_gpu(requests: list[Request], **options: object) -> TapeBatch:
    with torch.device("cuda"):
        return tape_batch(requests, **options)  # type: ignore[arg-type]


def workspace_for(batch: TapeBatch) -> DecodeWorkspace:
    bs, num_qo_heads, head_dim = batch.q.shape
    return DecodeWorkspace(bs, num_qo_heads, batch.arena.shape[3], head_dim, "cuda")


def test_a_captured_graph_follows_the_tables() -> None:
    """One graph; then other lengths, other rows and other tapes at the same addresses."""
    batches = [
        batch_on_gpu(requests, dtype=torch.bfloat16, kv_heads=8, head_dim=128, seed=seed)
        for seed, requests in enumerate([MIXED, MIXED[::-1], MIXED[1:] + MIXED[:1]])
    ]
    width = max(batch.req_to_token.shape[1] for batch in batches)
    slots = max(batch.arena.shape[2] for batch in batches)
    fixed = batches[0]
    fixed.arena = torch.zeros(2, 2, slots, 8, 128, dtype=torch.bfloat16, device="cuda")
    fixed.req_to_token = torch.zeros(8, width, dtype=torch.int32, device="cuda")
    batches[0] = batch_on_gpu(MIXED, dtype=torch.bfloat16, kv_heads=8, head_dim=128, seed=0)
    workspace = workspace_for(fixed)
    out = torch.empty_like(fixed.q)

    def step() -> None:
        tables = fixed.tables()
        ragged_decode(fixed.q, fixed.arena, 1, tables, fixed.scaling, out, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    for batch in batches:
        fixed.arena[:, :, : batch.arena.shape[2]] = batch.arena
        fixed.req_to_token[:, : batch.req_to_token.shape[1]] = batch.req_to_token
        for name in ("q", "req_pool_indices", "seq_lens", "prefix_lens", "budgets", "offsets"):
            getattr(fixed, name).copy_(getattr(batch, name))
        out.fill_(float("nan"))
        graph.replay()
        want = ragged_decode_ref(batch.q, batch.arena, 1, batch.tables(), batch.scaling)
        torch.testing.assert_close(out, want, rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("batch_size", [1, 7, 160])
def test_long_contexts(batch_size: int) -> None:
    requests = [
        Request(prefix=100 * i % 900, budget=[0, 3000, 900][i % 3], tail=1 + 37 * i % 400)
        for i in range(batch_size)
    ]
    batch = batch_on_gpu(requests, dtype=torch.bfloat16, kv_heads=2, head_dim=128)
    args = (batch.q, batch.arena, 1, batch.tables(), batch.scaling)
    got = ragged_decode(*args, workspace=workspace_for(batch))
    want = ragged_decode_ref(*args)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_flashinfer(dtype: torch.dtype, group: int, head_dim: int) -> None:
    """FlashInfer's kernels, planned by us, against the reference; planned again for another."""
    flashinfer = importlib.import_module("flashinfer")
    batch = batch_on_gpu(MIXED, dtype=dtype, kv_heads=2, group=group, head_dim=head_dim)
    decode = FlashInferDecode(flashinfer, batch.arena, batch.q.shape[1], 9, batch.scaling)
    decode.warm_up()
    for chosen in (slice(None), slice(1, 4)):
        rows = batch.req_pool_indices[chosen]
        budgets = batch.budgets[rows]
        lengths = batch.seq_lens[chosen]
        tables = batch.tables()._replace(req_pool_indices=rows, seq_lens=lengths)
        on_host = (batch.offsets[rows] * (budgets > 0)[:, None].int()).cpu()
        decode.plan_tape(tables, on_host)
        decode.plan_exact(tables, (lengths - budgets).cpu())
        for layer in range(2):
            want = ragged_decode_ref(batch.q[chosen], batch.arena, layer, tables, batch.scaling)
            got = decode.run(batch.q[chosen], layer)
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])
