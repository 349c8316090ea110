# SPDX-License-Identifier: Apache-2.0
"""What the GPU's decode benchmark does without a GPU: its command, its refusal, its uneven tape."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import decode_gpu
from benchmarks.kernels.shape import Shape, uneven_offsets

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["benchmarks/README.md", "docs/h100.md"])
def test_the_documents_commands_are_taken(document: str) -> None:
    text = (PROJECT / document).read_text()
    command = r"^    \S*python -m benchmarks\.kernels\.decode_gpu (.+)$"
    commands = re.findall(command, text, re.MULTILINE)
    assert commands
    for options in commands:
        arguments = decode_gpu._parser().parse_args(options.split())
        assert (arguments.layers, arguments.kv_heads, arguments.head_dim) == (32, 8, 128)
        assert arguments.batch and arguments.context and arguments.rounds > 0


def test_without_a_gpu_it_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"decode_cpu measures the CPU's"):
        decode_gpu.main([])


@pytest.mark.parametrize(("heads", "budget"), [(1, 33), (3, 100), (8, 14272)])
def test_uneven_heads_share_a_layers_entries(heads: int, budget: int) -> None:
    layers = 32
    shape = Shape(4, 16384, heads, 4, 128, torch.bfloat16)
    offsets = uneven_offsets(shape, layers, budget, torch.Generator().manual_seed(0))
    assert offsets.dtype == torch.int32 and offsets.shape == (layers * heads + 1,)
    assert offsets[0] == 0
    counts = offsets.diff().view(layers, heads)
    assert counts.sum(dim=1).tolist() == [heads * budget] * layers
    assert (counts > 0).all()
    assert bool((counts != budget).any()) == (heads > 1)
