# SPDX-License-Identifier: Apache-2.0
"""Other architectures with sliding windows: random models of four layers against the oracle.

Gemma 2 caps its logits. The others run with LAVA_ALL_MODELS=1: each takes a server of its own.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import assert_no_leak, generate, generate_all, info
from tests.e2e.conftest import WINDOW, StartServer
from tests.e2e.tiny_models import ARCHITECTURES, SLIDING_WINDOW, VOCABULARY, write_tiny_model
from tests.oracle import Oracle, assert_same_tokens
from tests.oracle_keep import KEEP

SERVED = list(ARCHITECTURES) if os.environ.get("LAVA_ALL_MODELS") else ["gemma2"]
LENGTHS = [60, 110, 150, 200, 260, 320, 400, 520, 700]
NEW_TOKENS = 24
METHODS = ["lava", "lava_span", "snapkv", "pyramidkv"]


@pytest.mark.parametrize("architecture", SERVED)
def test_compressed_text_is_the_oracles(
    architecture: str, start_server: StartServer, model_dir: Path, tmp_path: Path
) -> None:
    write_tiny_model(architecture, tmp_path / "model", model_dir)
    oracle = Oracle(tmp_path / "model")
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    budgets: list[float] = [0.5, 110, 0.25]
    settings: list[Any] = [
        {"method": METHODS[i % 4], "budget": budgets[i % 3]} for i in range(len(prompts))
    ]
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "64"),
        *("--kv-compression-config", '{"scope": "prompt"}'),
        *("--max-total-tokens", "8192", "--chunked-prefill-size", "256"),
        model=tmp_path / "model",
    ) as server:
        responses = generate_all(server.url, prompts, NEW_TOKENS, settings)
        exact = generate_all(server.url, prompts[-2:], NEW_TOKENS, [{"enabled": False}] * 2)
        # The window then lies in the answer alone: nothing of the tape is left in it.
        long = generate(server.url, prompts[4], SLIDING_WINDOW + 30, settings[0])
        assert_no_leak(server.url)
    changed = compressed = 0
    for prompt, chosen, response in zip(prompts, settings, responses, strict=True):
        prefill, found, keep = oracle.prefill(prompt, WINDOW), info(response), None
        assert SLIDING_WINDOW in prefill.reach and None in prefill.reach
        if found["status"] == "compressed":
            split = (found["shared_prefix_tokens"], found["kept_tokens"], WINDOW)
            keep = KEEP[chosen["method"]](prefill, *split)
            compressed += 1
        steps = oracle.greedy(prefill, keep, NEW_TOKENS, force=response["output_ids"])
        excused = assert_same_tokens(steps, response["output_ids"])
        without = oracle.greedy(prefill, None, NEW_TOKENS)
        changed += [step.fed for step in without] != response["output_ids"]
        print(len(prompt), chosen, found["status"], [f"{gap:.1e}" for _, gap in excused])
    assert compressed >= 6 and changed >= 3
    assert info(long)["status"] == "compressed"
    prefill, found = oracle.prefill(prompts[4], WINDOW), info(long)
    keep = KEEP["lava"](prefill, found["shared_prefix_tokens"], found["kept_tokens"], WINDOW)
    steps = oracle.greedy(prefill, keep, SLIDING_WINDOW + 30, force=long["output_ids"])
    assert_same_tokens(steps, long["output_ids"])
    for prompt, response in zip(prompts[-2:], exact, strict=True):
        prefill = oracle.prefill(prompt, WINDOW)
        steps = oracle.greedy(prefill, None, NEW_TOKENS, force=response["output_ids"])
        assert_same_tokens(steps, response["output_ids"])
