# SPDX-License-Identifier: Apache-2.0
"""Owns the `sglang.srt.platforms` entry point that turns on SGLang's CPU engine where it is meant.

SGLang calls `activate` in every process, before any of its modules asks whether it runs on a CPU,
and while `sglang.srt.utils` is half imported: nothing here may import SGLang.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

logger = logging.getLogger(__name__)

CPU_ENGINE_ENV = "SGLANG_USE_CPU_ENGINE"
CPU_PLATFORM_CLASS = "sglang.srt.platforms.cpu:CpuSRTPlatform"
_NOTICE_ENV = "LAVA_SGLANG_CPU_NOTICE"  # inherited, so that a server says it once
_DEFAULTS = {
    # OpenMP threads that spin between two steps starve the other processes of a small machine.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    # For several ranks SGLang makes an NCCL communicator if that library loads, and it needs a
    # GPU. Where it does not load the ranks have gloo.
    "SGLANG_NCCL_SO_PATH": "not-used-on-a-cpu",
}


def activate() -> str | None:
    """Prepares this process and its children for the CPU engine, or leaves everything as it is.

    On: `SGLANG_USE_CPU_ENGINE=1`, or it is unset and the command line says `--device cpu`, or it
    names no device and no accelerator is visible. Then it sets that variable and defaults for
    OpenMP and NCCL, and puts a stand-in for `sgl_kernel` in `sys.modules` if the real library
    cannot load.

    Returns:
        SGLang's own CPU platform class where it is on, else None. `SGLANG_PLATFORM` and
        `SGLANG_PLUGINS`, where set, decide whether SGLang calls this at all.
    """
    if not wants_cpu_engine(sys.argv, os.environ):
        return None
    os.environ[CPU_ENGINE_ENV] = "1"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    provide_sgl_kernel()
    return CPU_PLATFORM_CLASS


def wants_cpu_engine(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether SGLang shall use its CPU engine; see `activate`."""
    if CPU_ENGINE_ENV in environ:
        return environ[CPU_ENGINE_ENV] == "1"
    device = _device_argument(argv)
    if device is not None:
        return device == "cpu"
    return not accelerator_visible()


def accelerator_visible() -> bool:
    """Whether torch sees any device but the CPU (CUDA, ROCm, XPU, NPU, MPS, ...)."""
    import torch

    return bool(torch.accelerator.is_available())


def provide_sgl_kernel() -> ModuleType:
    """Makes `import sgl_kernel` work and returns that module: the real one where it loads.

    A real library without the CPU ops (the CUDA build, under `--device cpu`) stays in place; its
    missing `*_cpu` names are answered by the stand-in.
    """
    from lava_sglang.cpu_platform import sgl_kernel_stub

    try:
        return sgl_kernel_stub.answer_missing_cpu_ops(_import_real_sgl_kernel())
    # A native library can fail to load with ImportError, OSError, RuntimeError, ...
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
    stand_in = sgl_kernel_stub.build_module()
    sys.modules[sgl_kernel_stub.MODULE_NAME] = stand_in
    if _NOTICE_ENV not in os.environ:
        os.environ[_NOTICE_ENV] = "1"
        logger.warning(
            "sgl_kernel does not load here (%s). SGLang's CPU engine runs on plain torch with a "
            "stand-in for it. Missing: the ops of speculative decoding, of hierarchical sparse "
            "attention, of linear attention and of quantized weights, and all AMX ops.",
            reason,
        )
    return stand_in


def _import_real_sgl_kernel() -> ModuleType:
    try:
        return importlib.import_module("sgl_kernel")
    except Exception:
        # A failed package import leaves its submodules behind.
        for name in list(sys.modules):
            if name.partition(".")[0] == "sgl_kernel":
                del sys.modules[name]
        raise


def _device_argument(argv: Sequence[str]) -> str | None:
    """The value of the last `--device X` or `--device=X`, else None."""
    device = None
    for position, argument in enumerate(argv):
        if argument.startswith("--device="):
            device = argument.partition("=")[2]
        elif argument == "--device" and position + 1 < len(argv):
            device = argv[position + 1]
    return device
