# SPDX-License-Identifier: Apache-2.0
"""Invariant 5 where entries have eight bits and each layer its scale; and freed slots become
admitted requests. One server with a small pool.

The model is a random Llama of three layers: rounding to eight bits doubles the least difference
between two ways to add up whenever a number falls between two, and through the thirty layers of the
demo model logits of float32 and float64 then differ by half, as much as eight bits change them.
"""

import json
import random
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from lava_sglang.tools.load import measure_concurrency
from lava_sglang.tools.server_process import Server
from tests.e2e.client import assert_no_leak, generate_all, info
from tests.e2e.conftest import MAX_NEW_TOKENS, WINDOW, StartServer
from tests.oracle import Entries, Oracle, assert_same_tokens
from tests.oracle_keep import KEEP
from tests.unit.tiny_llama import write_tiny_llama

POOL = 2048  # slots
VOCABULARY = 49_152  # the tokenizer's
# What a checkpoint's calibration would say; K and V of a layer have the same.
SCALES = [0.021, 0.027, 0.033]
# Of two logits. Most differ by less than 1e-4, and by up to 0.0043 where a number fell between two
# of eight bits; a cache of float32 differs by 0.3 to 1.4.
ROUNDING_MARGIN = 0.01
LENGTHS = [110, 130, 150, 190, 230, 260, 320, 400, 520, 850, 300, 301, 302]
LONG_PROMPTS = [980, 990, 1000, 1000, 1005, 995, 1010]  # tokens
BUDGET = 0.125


@pytest.fixture(scope="module")
def small_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo model's tokenizer."""
    path = tmp_path_factory.mktemp("small-llama")
    write_tiny_llama(path, vocab_size=VOCABULARY, max_position_embeddings=4096)
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def random_prompts(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def server(start_server: StartServer, small_model: Path) -> Iterator[Server]:
    scales = small_model / "scales.json"
    of_rank = {str(layer): scale for layer, scale in enumerate(SCALES)}
    kv_cache = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": of_rank}}
    scales.write_text(json.dumps({"model_type": "llama", "kv_cache": kv_cache}))
    with start_server(
        *("--kv-cache-dtype", "fp8_e4m3", "--quantization-param-path", str(scales)),
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100"),
        *("--max-total-tokens", str(POOL), "--chunked-prefill-size", "1024"),
        model=small_model,
    ) as running:
        yield running


def test_text_over_eight_bits_is_the_oracles(server: Server, small_model: Path) -> None:
    """Compressed by several methods, and not at all."""
    oracle = Oracle(small_model, entries=Entries(torch.float8_e4m3fn, SCALES))
    prompts = random_prompts(LENGTHS, 1)
    methods, budgets = cycle(KEEP), cycle([0.25, 64, 0.5, 0.125])
    settings: list[Any] = [{"method": next(methods), "budget": next(budgets)} for _ in prompts[:-1]]
    settings.append({"enabled": False})
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    for prompt, chosen, response in zip(prompts, settings, responses, strict=True):
        found, keep = info(response), None
        prefill = oracle.prefill(prompt, WINDOW)
        if "method" in chosen:
            assert found["status"] == "compressed"
            keep = KEEP[chosen["method"]](prefill, 0, found["kept_tokens"], WINDOW)
        steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        excused = assert_same_tokens(steps, response["output_ids"], ROUNDING_MARGIN)
        print(len(prompt), chosen, [f"step {step}: {gap:.1e}" for step, gap in excused])
    # Eight bits change what is said: the comparison shows something.
    exact = Oracle(small_model).prefill(prompts[-1], WINDOW)
    rounded = oracle.prefill(prompts[-1], WINDOW)
    assert (exact.logits - rounded.logits).abs().max() > 100 * ROUNDING_MARGIN


def test_three_times_as_many_requests_decode_at_once(server: Server) -> None:
    prompts = random_prompts(LONG_PROMPTS, 2)
    peaks = {}
    for enabled in (False, True):
        server.flush_cache()
        settings = {"enabled": enabled, "budget": BUDGET}
        result = measure_concurrency(
            server.url, prompts, kv_compression=settings, max_new_tokens=24, ignore_eos=True
        )
        assert [trace.tokens for trace in result.responses] == [24] * len(prompts)
        peaks[enabled] = result.peak_decoding
        print(
            f"compression {'on' if enabled else 'off'}: {result.peak_decoding} requests decode "
            f"at once, {result.peak_used_slots} slots held, {result.seconds:.0f} s"
        )
        assert_no_leak(server.url)
    assert peaks[True] >= 3 * peaks[False]
