# SPDX-License-Identifier: Apache-2.0
"""Every method on the GPU keeps what it keeps on the CPU, and never makes the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.compact import compact
from lava_sglang.kernels.reference import compact_ref
from lava_sglang.kernels.tail_scores import tail_rows, tail_scores
from lava_sglang.kernels.trim import refill, trim
from lava_sglang.methods import METHODS
from lava_sglang.policy import (
    keep,
    method_of,
    score_prompt,
    select_again,
    select_entries,
    select_fewer,
    tape_entries,
    tape_scores,
)
from tests.gpu.prompt import WINDOW, made_up_prompt, on_cpu, unused_slots

BUDGET = 700


@contextmanager
def no_host_read() -> Iterator[None]:
    """CUDA calls that wait for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SLIDING: dict[str, Any] = {"sliding": (0, 2, 3), "sliding_window": 300}
MODELS = pytest.mark.parametrize("model", [{}, SLIDING], ids=["plain", "sliding"])


@MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "random"])
def test_the_cpu_keeps_the_same(name: str, dtype: torch.dtype, model: dict[str, Any]) -> None:
    """Sums are exact; near the threshold rounding may swap a few entries. Devices differ in what is
    random."""
    prompt = made_up_prompt(dtype=dtype, **model)
    method = method_of(KVCompressionConfig(method=name))
    got, want = keep(method, prompt, BUDGET), keep(method, on_cpu(prompt), BUDGET)
    layers, heads = prompt.num_layers, prompt.num_kv_heads
    assert int(got.counts.sum()) == layers * heads * BUDGET == int(got.offsets[-1])
    kept = [
        {*zip(*(part.tolist() for part in tape_entries(found)), strict=True)}
        for found in (got, want)
    ]
    assert len(kept[0]) == len(kept[1]) == layers * heads * BUDGET
    assert len(kept[0] - kept[1]) <= len(kept[1]) // 500, len(kept[0] - kept[1])


@MODELS
@pytest.mark.parametrize("name", [n for n, traits in METHODS.items() if traits.takes_ladder])
def test_a_compression_and_a_trim_read_nothing_back(name: str, model: dict[str, Any]) -> None:
    config = KVCompressionConfig(method=name, budget=[0.5, 0.25])
    method = method_of(config)
    prompt = made_up_prompt(**model)
    small = BUDGET // 2
    tape = unused_slots(prompt, BUDGET)
    exact = prompt.arena.clone()
    for run in range(2):  # the first compiles
        with no_host_read() if run else torch.no_grad():
            prompt_scores = score_prompt(method, prompt)
            kept = select_entries(method, prompt_scores, prompt, BUDGET)
            compact(prompt.arena, prompt.slots, tape, kept.tape_tokens, kept.offsets)
            scores = tape_scores(prompt, prompt_scores, kept)
            suffix_len = len(prompt.slots) - prompt.shared_prefix_len
            fewer = select_fewer(
                method,
                prompt.layers,
                scores,
                kept.offsets,
                prompt_scores.layer_weights,
                suffix_len,
                WINDOW,
                small,
            )
            trim(prompt.arena, tape, fewer.places, small)
        at_once = select_entries(method, prompt_scores, prompt, small)
        assert torch.equal(fewer.offsets, at_once.offsets)
        want = exact.clone()
        compact_ref(want, prompt.slots, tape[:small], at_once.tape_tokens, at_once.offsets)
        assert torch.equal(prompt.arena[:, :, tape[:small]], want[:, :, tape[:small]])
        assert torch.equal(prompt.arena[:, :, prompt.slots], exact[:, :, prompt.slots])


def test_a_long_answer_compressed_reads_nothing_back() -> None:
    method = method_of(KVCompressionConfig(method="lava"))
    prompt = made_up_prompt(layers=2)
    assert prompt.queries is not None and prompt.scaling is not None
    slots = torch.arange(prompt.arena.shape[2], device="cuda")
    prefix, tape, tail, again = (
        slots[:9].clone(), slots[9 : 9 + BUDGET].clone(), slots[3000:3100].clone(),
        slots[4000 : 4000 + BUDGET].clone(),
    )  # fmt: skip
    offsets = torch.arange(2 * 8 + 1, dtype=torch.int32, device="cuda") * BUDGET
    for run in range(2):
        with no_host_read() if run else torch.no_grad():
            scores = tail_scores(
                prompt.queries, prompt.arena, prefix, tape, offsets, tail, prompt.scaling, 900,
                method.score_options(WINDOW, slots.device),
            )  # fmt: skip
            kept = select_again(method, scores, offsets, WINDOW, BUDGET)
            owner, index = tape_entries(kept)
            source = tail_rows(prompt.arena, tape, offsets, tail, 900, owner, index)
            refill(prompt.arena, source, again)
    assert int(kept.offsets[-1]) == 2 * 8 * BUDGET
    scores_on_cpu = tail_scores(
        prompt.queries.cpu().float(), prompt.arena.cpu().float(), prefix.cpu(), tape.cpu(),
        offsets.cpu(), tail.cpu(), prompt.scaling.cpu(), 900,
        method.score_options(WINDOW, torch.device("cpu")),
    )  # fmt: skip
    torch.testing.assert_close(scores.cpu(), scores_on_cpu, rtol=2e-2, atol=1e-4)
