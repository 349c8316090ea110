# SPDX-License-Identifier: Apache-2.0
"""Owns the stand-in for `sgl_kernel`, whose CPU ops SGLang imports by name but which needs a GPU.

In SGLang 0.5.23 ordinary serving (radix cache, chunked prefill, retraction, any page size) imports
these names and calls none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

MODULE_NAME = "sgl_kernel"
STAND_IN_VERSION = "0.0.0+lava.stand.in"


class MissingCpuKernelError(NotImplementedError):
    """A CPU op of `sgl_kernel` was called on a machine that has no library with it."""

    def __init__(self, op: str) -> None:
        super().__init__(
            f"{MODULE_NAME}.{op} is not available: no {MODULE_NAME} with CPU ops loads on this "
            "machine, and the stand-in of lava-sglang has no plain-torch version of it. Turn off "
            "the feature that calls it (such as speculative decoding), install a CPU build of "
            f"{MODULE_NAME}, or serve on a GPU."
        )
        self.op = op


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Writes each request's next slots into its row; SGLang's Triton `assign_req_to_token_pool`.

    Args:
        req_pool_indices: [batch], the rows.
        req_to_token: [rows, pool_len] int32; `row[start:end]` of every request is overwritten.
        start_offset, end_offset: [batch], start <= end <= pool_len.
        out_cache_loc: [at least sum(end - start)], the slots, request after request.
        pool_len: the row length, which the GPU kernel needs as a stride.
    """
    import torch

    lengths = (end_offset - start_offset).long()
    total = int(lengths.sum())
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths - start_offset, lengths)
    rows = torch.repeat_interleave(req_pool_indices, lengths).long()
    columns = torch.arange(total) - first
    req_to_token[rows, columns] = out_cache_loc[:total].to(req_to_token.dtype)


def build_module() -> ModuleType:
    """A module `sgl_kernel` that has every `*_cpu` name; all but the one above raise when called.

    Other names are absent, so that SGLang's `try: from sgl_kernel import ...` sees that they are.
    """
    module = ModuleType(MODULE_NAME, __doc__)
    module.__spec__ = ModuleSpec(MODULE_NAME, loader=None, is_package=True)
    module.__path__ = []
    module.__dict__["__version__"] = STAND_IN_VERSION
    return answer_missing_cpu_ops(module)


def answer_missing_cpu_ops(module: ModuleType) -> ModuleType:
    """Gives `module` an answer for the `*_cpu` names that it lacks, and returns it; `torch.ops` one
    for those that models take from there.

    Changed in place; the names that it has, and a `__getattr__` of its own, stay.
    """
    module.__dict__.setdefault("__getattr__", _missing_cpu_op)
    answer_missing_torch_ops()
    return module


TORCH_OPS_OF_MODELS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)
"""What SGLang's Qwen3.5 takes from `torch.ops.sgl_kernel` when it is imported. The processor of all
Qwen-VL models imports it: without these names none of them is served."""


def answer_missing_torch_ops() -> None:
    """Gives `torch.ops.sgl_kernel` those names, where it lacks them, to raise when called."""
    import torch

    for name in TORCH_OPS_OF_MODELS:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, _missing_cpu_op(name))


def _missing_cpu_op(name: str) -> Callable[..., object]:
    if name == assign_req_to_token_pool_cpu.__name__:
        return assign_req_to_token_pool_cpu
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {MODULE_NAME!r} has no attribute {name!r}")

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise MissingCpuKernelError(name)

    missing.__name__ = name
    return missing
