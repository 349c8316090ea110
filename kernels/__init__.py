# SPDX-License-Identifier: Apache-2.0
"""Tensor ops of KV compression. Imports torch, triton and, for the CPU, numba; one op a file."""

if __name__ != "lava_sglang.kernels":
    raise ImportError("import this package as lava_sglang.kernels: one copy of each module")
