# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a compression times what the server does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels.compress import PREFILL, STEPS, TOTAL, CompressedPrompt, measure
from lava_sglang.config import KVCompressionConfig
from lava_sglang.policy import keep
from lava_sglang.tools.inspection.prefill import load_model, prefill
from lava_sglang.tools.passages import Prompt
from tests.unit.tiny_llama import HEAD_DIM, KV_HEADS, LAYERS, random_tokens, write_tiny_llama

CONFIG = KVCompressionConfig(method="lava", budget=(0.5,), window_size=8)


@pytest.mark.parametrize("method", ["lava", "adakv", "snapkv"])
def test_the_timed_steps_write_what_keep_chooses(method: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"method": method})
    done = prefill(load_model(write_tiny_llama(tmp_path)), random_tokens(50, seed=1), 8)
    prompt = CompressedPrompt(done, config)
    assert set(prompt.compress()) == set(STEPS)
    kept = keep(prompt.method, prompt.view, prompt.budget)
    assert torch.equal(prompt.table.offsets[1], kept.offsets)
    tape = prompt.arena[:, :, prompt.tape_slots]  # [L, 2, b, H, D]
    tape = tape.permute(0, 3, 2, 1, 4).reshape(-1, 2, HEAD_DIM)
    columns = torch.arange(LAYERS * KV_HEADS).repeat_interleave(kept.counts.flatten())
    expected = done.arena[columns // KV_HEADS, :, kept.tape_tokens.long(), columns % KV_HEADS]
    assert torch.equal(tape, expected)


def test_each_prompt_is_timed(tmp_path: Path) -> None:
    arguments = SimpleNamespace(
        model_path=write_tiny_llama(tmp_path), dtype="float32", device="cpu", load_format="auto",
        chunk_tokens=32, repeats=3,
    )  # fmt: skip
    prompts = [Prompt(f"prompt {seed}", random_tokens(60, seed)) for seed in (1, 2)]
    results = list(measure(arguments, CONFIG, prompts))
    assert len(results) == 2
    for times in results:
        assert set(times) == {PREFILL, *STEPS, TOTAL}
        assert len(times[PREFILL]) == 1 and len(times[TOTAL]) == 3
        assert all(seconds > 0 for samples in times.values() for seconds in samples)
        assert times[TOTAL] == [sum(step) for step in zip(*(times[s] for s in STEPS), strict=True)]
