# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing over kept entries, against transformers' own cache and the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.fidelity.divergence import compare
from benchmarks.fidelity.methods import choose, parse_variants
from benchmarks.fidelity.teacher_forcing import (
    Columns,
    continuation_logits,
    continuations,
    greedy,
    kept_columns,
)
from lava_sglang.kernels.select import Selection
from lava_sglang.tools.inspection.prefill import Prefill, load_model, prefill
from tests import oracle, oracle_keep
from tests.unit.tiny_llama import KV_HEADS, LAYERS, random_tokens, write_tiny_llama

PROMPT = random_tokens(70, 1)
TOKENS = random_tokens(12, 2)
WINDOW = 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir)


@pytest.fixture(scope="module")
def exact(model: Any) -> Prefill:
    return prefill(model, PROMPT, WINDOW)


@pytest.fixture(scope="module")
def stock(model_dir: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def random_columns(seed: int, counts: list[int]) -> Columns:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(len(PROMPT), generator=generator)[:count].sort().values for count in counts
    ]


def expected_gaps(model_dir: Path, columns: Columns) -> list[float]:
    """Of the forced tokens, under the oracle: best logit minus the token's."""
    keep = torch.zeros(LAYERS * KV_HEADS, len(PROMPT), dtype=torch.bool)
    for row, tokens in zip(keep, columns, strict=True):
        row[tokens] = True
    judge = oracle.Oracle(model_dir)
    steps = judge.greedy(
        judge.prefill(PROMPT, WINDOW),
        keep.view(LAYERS, KV_HEADS, -1),
        len(TOKENS),
        force=TOKENS,
    )
    return [step.gap for step in steps[1:]]


def gaps(logits: Tensor) -> list[float]:
    predicted = logits[:-1]
    forced = predicted.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    found: list[float] = (predicted.max(dim=1).values - forced).tolist()
    return found


def test_nothing_dropped_is_the_full_prompt(model: Any, exact: Prefill, stock: Any) -> None:
    everything = [torch.arange(len(PROMPT))] * (LAYERS * KV_HEADS)
    full, gathered = continuation_logits(model, exact, TOKENS, [None, everything])
    with torch.no_grad():
        expected = stock(torch.tensor([PROMPT + TOKENS])).logits[0, len(PROMPT) :]
    torch.testing.assert_close(full, expected, atol=1e-4, rtol=1e-4)
    targets = torch.tensor([*TOKENS[1:], 0])
    found = compare(expected.log_softmax(dim=1), gathered, targets)
    assert abs(found["kl"]) < 1e-6
    assert found["top1"] == 1.0
    assert found["nll_change"] == pytest.approx(0, abs=1e-5)


def test_equal_counts_equal_a_forward_on_the_gathered_cache(
    model: Any, exact: Prefill, stock: Any
) -> None:
    columns = random_columns(3, [20] * LAYERS * KV_HEADS)
    cache = DynamicCache()
    for layer in range(LAYERS):
        heads = columns[layer * KV_HEADS : (layer + 1) * KV_HEADS]
        for_layer = [
            torch.stack([exact.arena[layer, kv, tokens, h] for h, tokens in enumerate(heads)])[None]
            for kv in (0, 1)
        ]
        cache.update(*for_layer, layer)
    positions = torch.arange(len(PROMPT), len(PROMPT) + len(TOKENS))[None]
    with torch.no_grad():
        expected = stock(
            torch.tensor([TOKENS]), position_ids=positions, past_key_values=cache
        ).logits[0]
    found = continuation_logits(model, exact, TOKENS, [columns])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    full = continuation_logits(model, exact, TOKENS, [None])[0]
    assert (full - found).abs().max() > 0.1, "dropping 50 of 70 tokens must show"


def test_every_head_has_its_own_entries(model: Any, model_dir: Path, exact: Prefill) -> None:
    """Rows of one batch with ragged choices, each against the oracle's one token at a time."""
    choices = [random_columns(seed, [5, 60, 1, 33, 70, 12]) for seed in (4, 5)]
    logits = continuation_logits(model, exact, TOKENS, choices)
    for row, columns in zip(logits, choices, strict=True):
        assert gaps(row) == pytest.approx(expected_gaps(model_dir, columns), abs=1e-4)


@pytest.mark.parametrize("prefix_len", [0, 15])
@pytest.mark.parametrize("method", oracle_keep.KEEP)
def test_what_is_kept_is_what_the_server_keeps(
    model_dir: Path, exact: Prefill, method: str, prefix_len: int
) -> None:
    """The end-to-end tests hold the server to the same oracle."""
    (variant,) = parse_variants([method], {"window_size": WINDOW})
    budgets = [WINDOW + 4, 20, 36, len(PROMPT) - prefix_len]
    *chosen, nothing_dropped = choose(variant, exact, budgets, prefix_len)
    assert nothing_dropped is None
    judged = oracle.Oracle(model_dir).prefill(PROMPT, WINDOW)
    for budget, columns in zip(budgets, chosen, strict=False):
        keep = oracle_keep.KEEP[method](judged, prefix_len, budget, WINDOW).flatten(0, 1)
        assert columns is not None
        assert [c.tolist() for c in columns] == [row.nonzero().flatten().tolist() for row in keep]
        assert sum(map(len, columns)) == LAYERS * KV_HEADS * (prefix_len + budget)


def test_columns_are_the_prefix_and_the_tape() -> None:
    tape = torch.tensor([4, 6, 5, 6, 7, 6, 7], dtype=torch.int32)
    selection = Selection(torch.tensor([[2, 3], [1, 1]]), torch.tensor([0, 2, 5, 6, 7]), tape)
    columns = [column.tolist() for column in kept_columns(selection, 2)]
    assert columns == [[0, 1, 4, 6], [0, 1, 5, 6, 7], [0, 1, 6], [0, 1, 7]]


def test_batches_give_what_single_rows_give(model: Any, exact: Prefill) -> None:
    choices = {seed: random_columns(seed, [9] * LAYERS * KV_HEADS) for seed in range(5)}
    rows = dict(continuations(model, exact, TOKENS, choices, 2 * len(TOKENS) + 1))
    assert list(rows) == list(choices)
    for seed, columns in choices.items():
        alone = continuation_logits(model, exact, TOKENS, [columns])[0]
        torch.testing.assert_close(rows[seed], alone, atol=1e-5, rtol=1e-5)


def test_greedy_is_transformers_own(model: Any, exact: Prefill, stock: Any) -> None:
    expected = stock.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        do_sample=False,
        max_new_tokens=10,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    assert greedy(model, exact, 10) == expected
    end = expected[4]
    assert greedy(model, exact, 10, [end]) == expected[: expected.index(end)]


def test_compare_on_known_distributions() -> None:
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log() + 3
    found = compare(expected, logits, torch.tensor([0, 1]))
    log2 = 0.6931472
    assert found["kl"] == pytest.approx((0.5 * log2 - 0.25 * log2) / 2, abs=1e-6)
    assert found["top1"] == 0.5
    assert found["nll_change"] == pytest.approx(log2 / 2, abs=1e-6)
