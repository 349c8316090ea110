# SPDX-License-Identifier: Apache-2.0
"""A compressed request's decode positions: SGLang derives them from its shortened length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
