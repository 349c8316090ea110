# SPDX-License-Identifier: Apache-2.0
"""Compiles the FlashInfer modules of `flashinfer_decode` with nvcc, without a GPU.

    python -m tests.kernels.flashinfer_module [--arch 9.0a] [--head-dim 128] [--tensor-cores]

FlashInfer compiles them at a server's start. This shows that the installed FlashInfer and nvcc make
them for our dtypes and sizes, and what their kernels use; not that they run. Exits with 1 if one
does not compile, with 2 if there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton.backends.nvidia

from lava_sglang.kernels.flashinfer_decode import HEAD_DIMS


def cuda_home(nvcc: str) -> Path:
    """The toolkit's root. FlashInfer guesses it from the path of nvcc, which may be a wrapper."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    dry_run = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(dry_run, capture_output=True, text=True, check=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    assert root, said
    return Path(root[1]).resolve()


def set_environment(root: Path, scratch: Path, arch: str) -> None:
    """Before FlashInfer is imported. The driver's library is linked, so an empty one stands in."""
    subprocess.run(
        [
            "cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull,
            "-o", str(scratch / "libcuda.so"),
        ],
        check=True,
    )  # fmt: skip
    os.environ["CUDA_HOME"] = str(root)
    os.environ["LIBRARY_PATH"] = f"{scratch}:{os.environ.get('LIBRARY_PATH', '')}"
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(scratch)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
    os.environ.setdefault("MAX_JOBS", "2")


def modules(head_dim: int, tensor_cores: bool) -> dict[str, Any]:
    """What `FlashInferDecode` makes FlashInfer compile, in bf16. Imports FlashInfer."""
    import torch
    from flashinfer.jit.attention.modules import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module

    dtypes = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    no_rope, no_window, no_cap, no_fp16_qk = 0, False, False, False
    shape = (head_dim, head_dim, no_rope, no_window, no_cap)
    specs = {
        "decode (up to 3 query heads per KV head)": gen_batch_decode_module(*dtypes, *shape),
        "merge": gen_cascade_module(),
    }
    if tensor_cores:
        name = "decode by tensor cores (from 4 query heads per KV head)"
        specs[name] = gen_batch_prefill_module("fa2", *dtypes, *shape, no_fp16_qk)
    return specs


def usage(library: Path) -> str:
    """Registers and spills of a library's kernels."""
    tool = Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / "cuobjdump"
    dump = [str(tool), "--dump-resource-usage", str(library)]
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    kernels = [tuple(map(int, k)) for k in re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)]
    assert kernels, said[-500:]
    registers = [k[0] for k in kernels]
    spilling = sum(k[1] + k[2] > 0 for k in kernels)
    return (
        f"{len(kernels)} kernels, {min(registers)} to {max(registers)} registers, "
        f"{spilling} with a stack"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m tests.kernels.flashinfer_module"
    )
    parser.add_argument("--arch", default="9.0a", help="as FLASHINFER_CUDA_ARCH_LIST names it")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--tensor-cores", action="store_true", help="also: some ten minutes")
    args = parser.parse_args(argv)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on the PATH: FlashInfer's modules were NOT compiled, nothing is shown")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        set_environment(cuda_home(nvcc), Path(scratch), args.arch)
        for name, spec in modules(args.head_dim, args.tensor_cores).items():
            start = time.monotonic()
            spec.build(verbose=False)
            print(
                f"{name}: sm_{args.arch}, D{args.head_dim}, {time.monotonic() - start:.0f} s, "
                f"{usage(spec.jit_library_path)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
