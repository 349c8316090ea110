# SPDX-License-Identifier: Apache-2.0
"""The observation window is filled the same whatever the chunks, the batch and the prefix."""

from typing import NamedTuple

import pytest
import torch
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

from lava_sglang.attention.query_capture import capture_queries
from lava_sglang.attention.window import WindowCapture, WindowQueries
from lava_sglang.layer_map import LayerMap

NUM_LAYERS = 3
HEADS = 2
HEAD_DIM = 4


class Layer(NamedTuple):
    """What the capture reads of SGLang's RadixAttention."""

    layer_id: int
    tp_q_head_num: int = HEADS
    qk_head_dim: int = HEAD_DIM


PLAIN = LayerMap.plain(NUM_LAYERS)
LAYERS = [Layer(index) for index in range(NUM_LAYERS)]


def queries_of(request: int, start: int, end: int, layer: int) -> torch.Tensor:
    """[end - start, HEADS * HEAD_DIM]; every number says where it belongs."""
    tokens = torch.arange(start, end, dtype=torch.float32)[:, None]
    places = torch.arange(HEADS * HEAD_DIM, dtype=torch.float32) / 100
    return 10_000 * request + 1_000 * layer + tokens + places


def window_of(request: int, first: int, prompt_len: int, layer: int) -> torch.Tensor:
    return queries_of(request, first, prompt_len, layer).view(-1, HEADS, HEAD_DIM)


def extend(capture: WindowCapture, *chunks: tuple[int, WindowQueries, int, int, int]) -> None:
    """One forward pass. chunks: request, its window, start, end, prompt_len of each."""
    batch_start = 0
    for _, window, start, end, prompt_len in chunks:
        capture.add(window, batch_start, (start, end), prompt_len)
        batch_start += end - start
    if capture.segments:
        for layer in LAYERS:
            batch = [queries_of(r, start, end, layer.layer_id) for r, _, start, end, _ in chunks]
            capture.capture(layer, torch.cat(batch))
    capture.segments.clear()


def assert_holds(window: WindowQueries, request: int, first: int, prompt_len: int) -> None:
    assert window.complete
    expected = [window_of(request, first, prompt_len, layer.layer_id) for layer in LAYERS]
    queries = window.queries()
    assert queries.is_contiguous() and torch.equal(queries, torch.stack(expected))


@pytest.mark.parametrize("cut", range(1, 12))
@pytest.mark.parametrize("second_cut", range(1, 12))
def test_every_split_of_the_window(cut: int, second_cut: int) -> None:
    """12 prompt tokens, a window of 5: three chunks cut at every pair of places."""
    window, capture = WindowQueries(NUM_LAYERS, 5), WindowCapture(PLAIN)
    ends = sorted({cut, second_cut, 12})
    start = 0
    for end in ends:
        extend(capture, (0, window, start, end, 12))
        start = end
    assert_holds(window, 0, 7, 12)


@pytest.mark.parametrize("prompt_len", [5, 6, 100])
def test_one_chunk(prompt_len: int) -> None:
    window = WindowQueries(NUM_LAYERS, 5)
    extend(WindowCapture(PLAIN), (0, window, 0, prompt_len, prompt_len))
    assert_holds(window, 0, prompt_len - 5, prompt_len)


def test_one_token_a_chunk() -> None:
    window, capture = WindowQueries(NUM_LAYERS, 4), WindowCapture(PLAIN)
    for token in range(9):
        extend(capture, (0, window, token, token + 1, 9))
    assert_holds(window, 0, 5, 9)


@pytest.mark.parametrize("prefix_len", [6, 7, 8, 11])
def test_a_prefix_that_covers_the_first_window_tokens(prefix_len: int) -> None:
    """Their queries do not exist; the rest stands in order."""
    window = WindowQueries(NUM_LAYERS, 6)
    extend(WindowCapture(PLAIN), (0, window, prefix_len, 12, 12))
    assert window.first == prefix_len - 6
    assert_holds(window, 0, prefix_len, 12)


def test_several_requests_in_a_batch_keep_apart() -> None:
    windows = [WindowQueries(NUM_LAYERS, size) for size in (3, 5, 2, 4)]
    capture = WindowCapture(PLAIN)
    extend(capture, (0, windows[0], 0, 4, 8), (1, windows[1], 0, 7, 7), (3, windows[3], 0, 5, 20))
    assert windows[0].rows is None  # its chunk ends before its window
    assert_holds(windows[1], 1, 2, 7)
    extend(capture, (2, windows[2], 3, 9, 9), (0, windows[0], 4, 8, 8), (3, windows[3], 5, 18, 20))
    assert_holds(windows[0], 0, 5, 8)
    assert_holds(windows[2], 2, 7, 9)
    extend(capture, (3, windows[3], 18, 20, 20))
    assert_holds(windows[3], 3, 16, 20)


def test_a_chunk_before_the_window_stores_nothing() -> None:
    capture = WindowCapture(PLAIN)
    capture.add(WindowQueries(NUM_LAYERS, 4), 0, (0, 8), 12)
    assert capture.segments == []
    capture.add(WindowQueries(NUM_LAYERS, 4), 0, (0, 9), 12)
    assert capture.segments[0][1:] == (0, 8, 1)


def test_a_layer_that_stored_nothing_leaves_the_window_incomplete() -> None:
    window, capture = WindowQueries(NUM_LAYERS, 4), WindowCapture(PLAIN)
    capture.add(window, 0, (0, 6), 6)
    assert not window.complete
    for layer in LAYERS[:-1]:
        capture.capture(layer, queries_of(0, 0, 6, layer.layer_id))
        assert not window.complete
    capture.capture(LAYERS[-1], queries_of(0, 0, 6, LAYERS[-1].layer_id))
    assert window.complete


def test_the_stash_keeps_the_models_dtype_and_no_view_of_the_batch() -> None:
    window, capture = WindowQueries(1, 2), WindowCapture(PLAIN)
    capture.add(window, 0, (0, 4), 4)
    batch = torch.ones(4, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    capture.capture(Layer(0), batch)
    batch.zero_()
    assert window.queries()[0].dtype == torch.bfloat16
    assert (window.queries()[0] == 1).all()


@pytest.mark.parametrize("heads_apart", [False, True])
def test_queries_may_be_a_slice_of_a_fused_projection(heads_apart: bool) -> None:
    """Backends pass [tokens, heads * head_dim] or [tokens, heads, head_dim], often strided."""
    window, capture = WindowQueries(1, 3), WindowCapture(PLAIN)
    capture.add(window, 0, (0, 5), 5)
    fused = torch.randn(5, 3 * HEADS * HEAD_DIM)
    queries = fused[:, : HEADS * HEAD_DIM]
    capture.capture(Layer(0), queries.view(5, HEADS, HEAD_DIM) if heads_apart else queries)
    assert torch.equal(window.queries()[0], queries[2:].reshape(3, HEADS, HEAD_DIM))


class Backend:
    """As much of an attention backend as the capture meets."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def forward_extend(self, q: object, k: object, v: object, layer: object, *rest: object) -> str:
        self.calls.append((q, k, v, layer, *rest))
        return "output"


class Hybrid(HybridAttnBackend):  # type: ignore[misc]
    """SGLang's, which calls its prefill backend's own `forward`, over ours."""

    def __init__(self) -> None:
        self.prefill_backend = Backend()
        self.decode_backend = Backend()


class Recorder(WindowCapture):
    def __init__(self) -> None:
        super().__init__(PLAIN)
        self.seen: list[tuple[object, object]] = []

    def capture(self, layer: object, queries: object) -> None:
        self.seen.append((layer, queries))


def test_a_backend_keeps_its_identity_and_hands_over_its_queries() -> None:
    backend, capture = Backend(), Recorder()
    assert capture_queries(backend, capture) is backend
    assert isinstance(backend, Backend) and type(backend).__name__ == "LavaBackend"
    assert backend.forward_extend("q", "k", "v", "layer", "batch") == "output"
    assert capture.seen == []  # no request of the batch wants its queries
    capture.add(WindowQueries(1, 2), 0, (0, 2), 2)
    assert backend.forward_extend("q", "k", "v", "layer", "batch") == "output"
    assert capture.seen == [("layer", "q")]
    assert backend.calls == [("q", "k", "v", "layer", "batch")] * 2


def test_other_backends_of_the_class_are_left_alone() -> None:
    capture_queries(Backend(), WindowCapture(PLAIN))
    assert type(Backend()) is Backend


def test_a_hybrid_backend_captures_at_its_prefill_backend() -> None:
    backend = Hybrid()
    assert capture_queries(backend, WindowCapture(PLAIN)) is backend
    assert type(backend) is Hybrid
    assert type(backend.prefill_backend).__name__ == "LavaBackend"
    assert type(backend.decode_backend) is Backend
