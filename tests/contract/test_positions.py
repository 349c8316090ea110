# SPDX-License-Identifier: Apache-2.0
"""Decode positions of multimodal models: SGLang's own arithmetic, as if nothing was compressed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from lava_sglang.attention.positions import mrope_of_true_lengths
from lava_sglang.mem_cache.tape import TapeTable

ROWS = [3, 1, 4, 2, 5]
TRUE_LENGTHS = [700, 90, 800, 300, 60]  # of the texts, the new token included
REMOVED = [400, 0, 500, 0, 0]


def images(shift: int, table_len: int) -> MultimodalInputs:
    """Of a request whose images take `-shift` positions less than tokens. table_len: tokens whose
    positions are known beforehand; those of the table are unlike any that lengths give."""
    table = torch.arange(3 * table_len).view(3, table_len) + 10_000
    return MultimodalInputs(
        mm_items=[], mrope_positions=table, mrope_position_delta=torch.tensor([[shift]])
    )


IMAGES: dict[str, list[MultimodalInputs | None]] = {
    "text": [None] * 4,
    # Each table is longer than the request's row and shorter than its text.
    "images": [images(-50, 690), None, images(-200, 799), images(-30, 290)],
    "a table of what is to come": [images(-50, 690), None, None, images(-30, 999), None],
}


def decode_positions(
    lengths: list[int], multimodal: list[MultimodalInputs | None], compressed: bool
) -> torch.Tensor:
    """[3, bs], of the text's length where nothing is compressed, else of the row's."""
    tape = TapeTable(8, 1, 2, "cpu")
    removed = REMOVED if compressed else [0] * len(REMOVED)
    for row, count in zip(ROWS, removed, strict=True):
        if count:
            tape.commit(row, 0, 100, count, torch.tensor([0, 100, 200]))
    runner: Any = SimpleNamespace(kv_compression=SimpleNamespace(tape=tape), device="cpu")
    # A row behind those of the batch's requests is a member of a beam.
    reqs = [SimpleNamespace(slots_freed=count) for count in removed[: len(multimodal)]]
    batch: Any = SimpleNamespace(reqs=reqs, multimodal_inputs=multimodal)
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(ROWS),
        input_ids=torch.zeros(len(ROWS), dtype=torch.int64),
        req_pool_indices=torch.tensor(ROWS),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu=torch.tensor(lengths),
        out_cache_loc=torch.zeros(len(ROWS), dtype=torch.int64),
        seq_lens_sum=sum(lengths),
    )
    before = forward_batch.seq_lens, forward_batch.seq_lens_cpu
    compute = ForwardBatch._compute_mrope_positions_decode
    if compressed:
        mrope_of_true_lengths(compute, forward_batch, runner, batch)
    else:
        compute(forward_batch, runner, batch)
    assert (forward_batch.seq_lens, forward_batch.seq_lens_cpu) == before
    assert forward_batch.seq_lens.tolist() == forward_batch.seq_lens_cpu.tolist() == lengths
    return forward_batch.mrope_positions


@pytest.mark.parametrize("multimodal", IMAGES.values(), ids=IMAGES)
def test_positions_are_those_of_the_whole_text(
    runtime_context: None, multimodal: list[MultimodalInputs | None]
) -> None:
    expected = decode_positions(TRUE_LENGTHS, multimodal, compressed=False)
    short = [length - count for length, count in zip(TRUE_LENGTHS, REMOVED, strict=True)]
    assert torch.equal(decode_positions(short, multimodal, compressed=True), expected)


def test_the_shift_of_an_image_is_kept(runtime_context: None) -> None:
    short = [length - count for length, count in zip(TRUE_LENGTHS, REMOVED, strict=True)]
    found = decode_positions(short, IMAGES["images"], compressed=True)
    assert found.tolist() == [[649, 89, 599, 269, 59]] * 3
