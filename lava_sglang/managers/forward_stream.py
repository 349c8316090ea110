# SPDX-License-Identifier: Apache-2.0
"""Work that is enqueued behind the forward pass that SGLang launched last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


class ForwardStream:
    """A context on the stream of the forward passes.

    With overlap scheduling the scheduler runs on one stream and forward passes on another; without
    it, and on CPU, there is one queue and every method here does nothing. May be entered where
    SGLang is on that stream already: it hands out the rows of a beam there.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.overlap = scheduler.enable_overlap and scheduler.device != "cpu"
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        if self.overlap:
            # Not `scheduler.forward_stream_ctx`: a context that is entered again while it is open
            # forgets which stream to go back to.
            context = self.scheduler.device_module.stream(self.scheduler.forward_stream)
            context.__enter__()
            self._entered.append(context)
            self.scheduler.forward_stream.wait_stream(self.scheduler.schedule_stream)

    def __exit__(self, *exc: Any) -> None:
        if self.overlap:
            self._entered.pop().__exit__(*exc)

    def keep_alive(self, *tensors: torch.Tensor) -> None:
        """Tensors made by the scheduler that work on this stream reads."""
        if self.overlap:
            for tensor in tensors:
                tensor.record_stream(self.scheduler.forward_stream)

    def fence_row_writes(self) -> None:
        """Keep the scheduler's next writes to rows behind what the forward pass reads of them.

        By the streams: SGLang's own barrier of this kind does nothing on AMD GPUs, and after it has
        been used once it waits for the whole stream as well.
        """
        if self.overlap:
            self.scheduler.schedule_stream.wait_stream(self.scheduler.forward_stream)
