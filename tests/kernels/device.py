# SPDX-License-Identifier: Apache-2.0
"""Where the launched kernels run: Triton's interpreter on a CPU, or the GPU of this machine.

`make gpu` sets LAVA_TEST_DEVICE=cuda; then every tensor that a test makes is on the GPU.
"""

from __future__ import annotations

import os

import torch

ON_GPU = os.environ.get("LAVA_TEST_DEVICE") == "cuda"
# The interpreter computes bfloat16 wrong without a word.
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
DTYPES = [*HALVES, torch.float32]


def generator(seed: int) -> torch.Generator:
    """Of random tensors on the default device."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)
