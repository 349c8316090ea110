# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 270M: fifteen of its eighteen layers see 512 tokens. One server of real weights.

Invariants 1 to 5 as in `test_suffix_scope.py`. A sliding layer keeps what it reads, so the oracle
hides nothing from one but what is out of its window. With LAVA_ALL_MODELS=1 of 20 prompts of up to
4,000 tokens, and of all methods behind a prefix: the oracle alone then takes minutes.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo_model import GEMMA3, write_demo_model
from lava_sglang.tools.server_process import Server
from tests.e2e.client import assert_no_leak, generate, generate_all, info, stats
from tests.e2e.conftest import MAX_NEW_TOKENS, PROJECT, WINDOW, StartServer
from tests.e2e.prompts import prose_tokens
from tests.oracle import Oracle, Prefill, assert_same_tokens
from tests.oracle_keep import KEEP

LAYERS, FULL, SLIDING_WINDOW = 18, 3, 512
BOS = 2
ALL = bool(os.environ.get("LAVA_ALL_MODELS"))
LENGTHS = [100, 560, 600, 760, 1000]
if ALL:
    LENGTHS = [100, 300, 511, 512, 530, 560, 600, 640, 700, 760, 820, 900, 1000, 1100, 1200, 1350]
    LENGTHS += [1500, 1900, 2600, 4000]
BUDGETS: list[float] = [0.5, 0.25, 0.125, 600]
METHODS = ["lava", "lava_span", "snapkv"]
# The fewest slots that hold what sliding layers read, and 33 entries of each full one.
FEWEST = math.ceil((15 * 511 + 3 * (WINDOW + 1)) / 18)


@pytest.fixture(scope="module")
def gemma_dir() -> Path:
    """Converted on first use; LAVA_GEMMA_DIR names another place."""
    directory = Path(os.environ.get("LAVA_GEMMA_DIR", PROJECT / ".models" / "gemma3"))
    write_demo_model(directory, print, GEMMA3)
    return directory


@pytest.fixture(scope="module")
def gemma(gemma_dir: Path) -> Oracle:
    return Oracle(gemma_dir)


@pytest.fixture(scope="module")
def texts(gemma: Oracle) -> list[list[int]]:
    """Real prose of these lengths, from different places."""
    tokens, start, found = prose_tokens(gemma.tokenizer), 0, []
    for length in LENGTHS:
        found.append([BOS, *tokens[start : start + length - 1]])
        start += length
    return found


@pytest.fixture(scope="module")
def exact(gemma: Oracle, texts: list[list[int]]) -> list[Prefill]:
    return [gemma.prefill(text, WINDOW) for text in texts]


@pytest.fixture(scope="module")
def server(start_server: StartServer, gemma_dir: Path) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100"),
        *("--kv-compression-config", '{"scope": "suffix"}'),
        *("--max-total-tokens", "24576", "--chunked-prefill-size", "512"),
        model=gemma_dir,
    ) as running:
        yield running


def slots_of(method: str, budget: float, suffix_len: int) -> int:
    """b, from the model's numbers."""
    wanted = int(budget) if budget > 1 else math.ceil(budget * suffix_len)
    if method == "snapkv":
        return max(wanted, SLIDING_WINDOW - 1)
    lossless = math.ceil((15 * 511 + 3 * suffix_len) / 18)
    return max(min(wanted, lossless), FEWEST)


def settings_of(index: int) -> dict[str, Any]:
    """Methods and budgets meet in every way."""
    return {"method": METHODS[index % 3], "budget": BUDGETS[(index + index // 3) % 4]}


def test_compressed_text_is_the_oracles(
    server: Server, gemma: Oracle, texts: list[list[int]], exact: list[Prefill]
) -> None:
    """Cold tree, several methods and budgets in one batch, chunked and not."""
    settings = [settings_of(index) for index in range(len(texts))]
    responses = generate_all(server.url, texts, MAX_NEW_TOKENS, settings)
    off = generate_all(server.url, texts, MAX_NEW_TOKENS, [{"enabled": False}] * len(texts))
    changed = sum(a["output_ids"] != b["output_ids"] for a, b in zip(responses, off, strict=True))
    compressed, lossy = 0, 0
    for text, prefill, chosen, response in zip(texts, exact, settings, responses, strict=True):
        found, keep = info(response), None
        # Of two prompts that run one after the other the second finds <bos> in the tree, and a
        # token or two behind it.
        prefix_len, suffix_len = found["shared_prefix_tokens"], found["suffix_tokens"]
        assert prefix_len < 8 and prefix_len + suffix_len == len(text)
        expected = slots_of(chosen["method"], chosen["budget"], suffix_len)
        if suffix_len < SLIDING_WINDOW - 1:
            assert found["reason"] == "too_short"
        elif expected >= suffix_len:
            assert found["reason"] == "budget_covers_suffix"
        else:
            assert (found["status"], found["kept_tokens"]) == ("compressed", expected)
            keep = KEEP[chosen["method"]](prefill, prefix_len, expected, WINDOW)
            compressed += 1
            lossy += not keep.all()
        steps = gemma.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        excused = assert_same_tokens(steps, response["output_ids"])
        print(len(text), chosen, [f"step {step}: {gap:.1e}" for step, gap in excused])
    assert compressed >= (13 if ALL else 4) and lossy >= (8 if ALL else 4)
    assert changed > 0, "compression changed no text: the comparison shows nothing"


def test_prefix_hit_and_whole_budget_give_the_exact_text(
    server: Server, gemma: Oracle, texts: list[list[int]], exact: list[Prefill]
) -> None:
    """The tree holds the exact prompts that were compressed for others; then it holds nothing."""
    chosen: list[dict[str, Any]] = [{"enabled": False}, {"budget": 1.0}]
    some = slice(1, None, 3)
    for settings in chosen:
        responses = generate_all(
            server.url, texts[some], MAX_NEW_TOKENS, [settings] * len(texts[some])
        )
        for prefill, response in zip(exact[some], responses, strict=True):
            steps = gemma.greedy(prefill, None, MAX_NEW_TOKENS, force=response["output_ids"])
            assert_same_tokens(steps, response["output_ids"])
            assert info(response)["status"] == "skipped"
            hit = response["meta_info"]["cached_tokens"]
            whole = len(prefill.input_ids) - 1
            assert hit >= whole if settings is chosen[0] else hit < 8
        server.flush_cache()


@pytest.mark.parametrize("method", METHODS if ALL else METHODS[:1])
def test_behind_a_shared_prefix(
    server: Server, gemma: Oracle, texts: list[list[int]], method: str
) -> None:
    """One document, several questions; a window that ends in the question and one that does not."""
    server.flush_cache()
    document = texts[-2][:700]
    assert info(generate(server.url, document, 1))["reason"] == "no_decode"
    questions = [texts[-1][-560:], texts[-1][100:750]]
    prompts = [document + question for question in questions]
    settings = [{"method": method, "budget": 515}, {"method": method, "budget": 600}]
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    for prompt, response in zip(prompts, responses, strict=True):
        found = info(response)
        assert found["shared_prefix_tokens"] == len(document)
        assert found["status"] == "compressed"
        prefill = gemma.prefill(prompt, WINDOW)
        keep = KEEP[method](prefill, len(document), found["kept_tokens"], WINDOW)
        steps = gemma.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        assert_same_tokens(steps, response["output_ids"])


def test_nothing_leaks_after_200_mixed_requests(server: Server, texts: list[list[int]]) -> None:
    server.flush_cache()
    count = 200
    # Each starts otherwise, so that the tree holds nothing of it; a fifth see past the window.
    prompts = [[1000 + index, *texts[-1][1 : 90 + 17 * (index % 31)]] for index in range(count)]
    settings = [{**settings_of(index), "enabled": index % 7 != 0} for index in range(count)]
    before = stats(server.url)["requests"]
    responses = generate_all(server.url, prompts, 3, settings, parallel=16)
    assert all(len(response["output_ids"]) == 3 for response in responses)
    after = stats(server.url)["requests"]
    assert after["compressed"] > before["compressed"]
    assert_no_leak(server.url)
    server.flush_cache()
    assert_no_leak(server.url)
    assert stats(server.url)["evictable_slots"] == 0
