# SPDX-License-Identifier: Apache-2.0
"""Work that is enqueued behind the forward pass that SGLang launched last."""

from __future__ import annotations

from typing import Any

import torch


class ForwardStream:
    """A context on the stream of the forward passes.

    With overlap scheduling the scheduler runs on one stream and forward passes on another; without
    it, and on CPU, there is one queue and every method here does nothing.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.overlap = scheduler.enable_overlap and scheduler.device != "cpu"

    def __enter__(self) -> None:
        if self.overlap:
            self.scheduler.forward_stream_ctx.__enter__()
            self.scheduler.forward_stream.wait_stream(self.scheduler.schedule_stream)

    def __exit__(self, *exc: Any) -> None:
        if self.overlap:
            self.scheduler.forward_stream_ctx.__exit__(*exc)

    def keep_alive(self, *tensors: torch.Tensor) -> None:
        """Tensors made by the scheduler that work on this stream reads."""
        if self.overlap:
            for tensor in tensors:
                tensor.record_stream(self.scheduler.forward_stream)

    def fence_row_writes(self) -> None:
        """Keep the scheduler's next writes to rows behind what the forward pass reads of them."""
        if self.overlap:
            self.scheduler._apply_war_barrier()
