# SPDX-License-Identifier: Apache-2.0
"""Tensor ops of KV compression. Imports torch (and triton) only; one op a file, reference first."""

if __name__ != "lava_sglang.kernels":
    raise ImportError("import this package as lava_sglang.kernels: one copy of each module")
