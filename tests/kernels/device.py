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
# AMD's own e4m3 has no type on NVIDIA's chips, nor in their Triton.
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
if not ON_GPU or torch.version.hip is not None:
    FP8.append(torch.float8_e4m3fnuz)


def generator(seed: int) -> torch.Generator:
    """Of random tensors on the default device."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)
