# SPDX-License-Identifier: Apache-2.0
"""The prefill on transformers records what the independent oracle records."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.policy import keep, method_of
from lava_sglang.tools.inspection.prefill import Prefill, load_model, prefill
from tests import oracle, oracle_keep
from tests.unit.tiny_llama import random_tokens, write_tiny_llama

PROMPT = random_tokens(90, 1)
WINDOW = 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    """In float64: the order of sums differs with the chunks and between CPUs."""
    return load_model(model_dir, torch.float64)


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> oracle.Prefill:
    return oracle.Oracle(model_dir, torch.float64).prefill(PROMPT, WINDOW)


@pytest.mark.parametrize("chunk_tokens", [7, 30, 85, 1024])
def test_equals_the_oracle_in_any_chunks(
    model: Any, expected: oracle.Prefill, chunk_tokens: int
) -> None:
    """85 and 7 cut the window in two."""
    found = prefill(model, PROMPT, WINDOW, chunk_tokens)
    torch.testing.assert_close(found.arena[:, 0].transpose(1, 2), expected.keys)
    torch.testing.assert_close(found.arena[:, 1].transpose(1, 2), expected.values)
    torch.testing.assert_close(found.queries.transpose(1, 2), expected.window_queries)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.scaling.tolist() == pytest.approx([16**-0.5] * 3)


@pytest.mark.parametrize("prefix_len", [0, 20])
@pytest.mark.parametrize("method", oracle_keep.KEEP)
def test_methods_keep_what_the_oracle_keeps(
    model: Any, expected: oracle.Prefill, method: str, prefix_len: int
) -> None:
    config = KVCompressionConfig(method=method, window_size=WINDOW)
    view = prefill(model, PROMPT, WINDOW, 40).view(WINDOW, prefix_len)
    kept = keep(method_of(config), view, 24)
    mask = oracle_keep.KEEP[method](expected, prefix_len, 24, WINDOW)[:, :, prefix_len:].flatten(
        0, 1
    )
    for column, (start, end) in enumerate(zip(kept.offsets, kept.offsets[1:], strict=False)):
        tokens = mask[column].nonzero().flatten() + prefix_len
        assert kept.tape_tokens[start:end].tolist() == tokens.tolist()


@pytest.fixture(scope="module")
def short(model: Any) -> Prefill:
    return prefill(model, PROMPT[:20], WINDOW)


def test_bad_windows_name_the_range(model: Any, short: Prefill) -> None:
    with pytest.raises(ValueError, match="window_size=9: accepts 1 to 8"):
        short.view(9)
    with pytest.raises(ValueError, match="shared_prefix_len=12: accepts 0 to 11"):
        short.view(8, 12)
    with pytest.raises(ValueError, match="window_size=20: accepts 1 to 19"):
        prefill(model, PROMPT[:20], 20)


def test_without_last_is_the_shorter_prompt(model: Any, short: Prefill) -> None:
    longer = prefill(model, PROMPT[:23], WINDOW + 3).without_last(3)
    view, expected = longer.view(WINDOW), short.view(WINDOW)
    assert longer.prompt_len == 20 and longer.logits is None
    torch.testing.assert_close(view.queries, expected.queries)
    torch.testing.assert_close(view.arena[:, :, view.slots], expected.arena)
    config = KVCompressionConfig(method="lava", window_size=WINDOW)
    kept = [keep(method_of(config), prompt, 12) for prompt in (view, expected)]
    assert torch.equal(kept[0].tape_tokens, kept[1].tape_tokens)
    with pytest.raises(ValueError, match="count=8: accepts 1 to 7"):
        short.without_last(8)


def test_other_kinds_of_attention_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`position_ids`, which Llama hands to its attention, stands for what others hand over."""
    monkeypatch.setattr(
        "lava_sglang.tools.inspection.prefill._UNSUPPORTED", ("softcap", "s_aux", "position_ids")
    )
    with pytest.raises(NotImplementedError, match="LlamaAttention: attention with position_ids"):
        prefill(model, PROMPT[:20], WINDOW)
