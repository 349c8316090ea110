# SPDX-License-Identifier: Apache-2.0
"""A compressed request's decode positions: SGLang derives them from its shortened length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def shift_positions(
    forward_batch: ForwardBatch,
    cls: type,
    batch: ScheduleBatch,
    model_runner: ModelRunner,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AFTER hook on `ForwardBatch.init_new`: true positions in decode, for RoPE. Mutates the batch.

    Reads the tables that `query_capture.AttentionHook` has put on the runner.
    """
    if not forward_batch.forward_mode.is_decode():
        return
    tape = model_runner.kv_compression.tape
    forward_batch.positions = tape.shift(forward_batch.positions, forward_batch.req_pool_indices)
    if tape.host is not None:  # SGLang hands the rows over with extend batches only
        forward_batch.req_pool_indices_cpu = batch.req_pool_indices_cpu


def mrope_of_true_lengths(
    original: Callable[..., None],
    forward_batch: ForwardBatch,
    model_runner: ModelRunner,
    batch: ScheduleBatch,
) -> None:
    """AROUND hook on `ForwardBatch._compute_mrope_positions_decode`: SGLang computes a multimodal
    model's three positions [3, bs] of each request from its length, by way of what its images took
    or of the positions it was sent. It is shown the true lengths meanwhile. Mutates the batch.

    Beam search appends rows behind those of `batch.reqs`; they are never compressed.
    """
    physical = forward_batch.seq_lens, forward_batch.seq_lens_cpu
    tape = model_runner.kv_compression.tape
    removed = torch.zeros_like(forward_batch.seq_lens_cpu)
    removed[: len(batch.reqs)] = torch.tensor(
        [req.slots_freed for req in batch.reqs], dtype=removed.dtype
    )
    forward_batch.seq_lens = tape.shift(forward_batch.seq_lens, forward_batch.req_pool_indices)
    forward_batch.seq_lens_cpu = forward_batch.seq_lens_cpu + removed
    try:
        original(forward_batch, model_runner, batch)
    finally:
        forward_batch.seq_lens, forward_batch.seq_lens_cpu = physical
