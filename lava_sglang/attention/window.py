# SPDX-License-Identifier: Apache-2.0
"""The observation window: the queries of a prompt's last tokens, stashed while it is prefilled."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lava_sglang.layer_map import LayerMap

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class WindowQueries:
    """The window queries of one request, of all full layers, filled by one or many chunks.

    `rows` is [full layers, window_size, num_qo_heads, head_dim] in the model's dtype, allocated by
    the first layer that stores. A prefix from the radix tree may cover the window's first tokens:
    `first` is the first token of the window that was prefilled.
    """

    def __init__(self, num_full_layers: int, window_size: int):
        self.num_layers = num_full_layers
        self.window_size = window_size
        self.first = window_size
        self.rows: torch.Tensor | None = None
        self.layers_stored: set[int] = set()

    def store(self, layer: int, start: int, queries: torch.Tensor) -> None:
        """Copy `queries` [n, num_qo_heads, head_dim] to places start.. of the window. layer: place
        among the full ones."""
        if self.rows is None:
            shape = (self.num_layers, self.window_size, *queries.shape[1:])
            self.rows = queries.new_empty(shape)
        self.rows[layer, start : start + queries.shape[0]] = queries
        self.layers_stored.add(layer)
        self.first = min(self.first, start)

    @property
    def complete(self) -> bool:
        """Whether every full layer stored its queries."""
        return len(self.layers_stored) == self.num_layers

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes

    def queries(self) -> torch.Tensor:
        """[full layers, window queries, num_qo_heads, head_dim]: those prefilled, in order."""
        assert self.rows is not None
        return self.rows[:, self.first :].contiguous()


class Segment(NamedTuple):
    """Rows of an extend batch that belong to a request's observation window."""

    window: WindowQueries
    window_start: int  # place in the window
    batch_start: int  # row of the batch's token-major tensors
    num_tokens: int


class WindowCapture:
    """What the attention backend hands each layer's queries to. Empty outside an extend."""

    def __init__(self, layers: LayerMap) -> None:
        self.layers = layers
        self.segments: list[Segment] = []

    def add(
        self, window: WindowQueries, batch_start: int, chunk: tuple[int, int], prompt_len: int
    ) -> None:
        """Stash the window's part of a chunk: prompt positions [chunk[0], chunk[1])."""
        window_begin = prompt_len - window.window_size
        begin = max(chunk[0], window_begin)
        if begin < chunk[1]:
            self.segments.append(
                Segment(
                    window,
                    window_start=begin - window_begin,
                    batch_start=batch_start + begin - chunk[0],
                    num_tokens=chunk[1] - begin,
                )
            )

    def capture(self, layer: RadixAttention, queries: torch.Tensor) -> None:
        """Called after each layer's extend attention.

        layer: SGLang's RadixAttention. queries: [num_tokens, num_qo_heads * head_dim], after RoPE.
        """
        place = self.layers.place_among_full(layer.layer_id)
        if place is None:
            return
        for segment in self.segments:
            rows = queries[segment.batch_start : segment.batch_start + segment.num_tokens]
            segment.window.store(
                place,
                segment.window_start,
                rows.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            )


class DecodeQueries:
    """The queries of each request's last decode steps, for compressing a long answer.

    `rows` is [rows of req_to_token, full layers, window_size, num_qo_heads, head_dim], a ring by
    the token's true position. Row 0 takes what padding writes. At a fixed address, for captured
    graphs.
    """

    def __init__(
        self,
        layers: LayerMap,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        """shape: of `rows`."""
        self.layers = layers
        self.window_size = shape[2]
        self.rows = torch.zeros(shape, dtype=dtype, device=device)

    def store(
        self, layer: RadixAttention, queries: torch.Tensor, forward_batch: ForwardBatch
    ) -> None:
        """Called in each layer's decode. queries: [bs, num_qo_heads * head_dim], after RoPE."""
        full_layer = self.layers.place_among_full(layer.layer_id)
        if full_layer is None:
            return
        place = forward_batch.positions % self.window_size
        heads = queries.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self.rows[forward_batch.req_pool_indices, full_layer, place] = heads

    def last(self, row: int, end: int) -> torch.Tensor:
        """Of positions up to `end`, exclusive, the oldest first.

        Returns [full layers, window_size, num_qo_heads, head_dim].
        """
        return self.rows[row].roll(-(end % self.window_size), dims=1).contiguous()
