# SPDX-License-Identifier: Apache-2.0
"""Checks the oracle against transformers' own decoding and a Llama written out one token a time."""

import ast
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests import oracle as oracle_module
from tests import oracle_keep as oracle_keep_module
from tests import oracle_tails as oracle_tails_module
from tests.oracle import Oracle, Prefill, Step, assert_same_tokens
from tests.oracle_keep import KEEP, per_rank_keep
from tests.oracle_tails import Rule, long_answer

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 2, 4, 2, 16, 64, 128
GROUP = QUERY_HEADS // KV_HEADS
ROPE_THETA = 10_000.0
PROMPT_LEN, WINDOW, NEW_TOKENS = 48, 8, 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (PROMPT_LEN,), generator=generator).tolist()


@pytest.fixture(scope="module")
def prefill(oracle: Oracle, prompt: list[int]) -> Prefill:
    return oracle.prefill(prompt, WINDOW)


@pytest.fixture(scope="module")
def ragged_keep() -> Tensor:
    """About a third of the entries, a different number in every head."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(LAYERS, KV_HEADS, PROMPT_LEN, generator=generator) < 0.35


class OneTokenAtATime:
    """Llama in float64: each KV head is a list of rows, and a dropped entry is gone from it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.weights = {name: w.double() for name, w in model.state_dict().items()}
        self.eps = model.config.rms_norm_eps
        exponent = torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM
        self.frequencies = ROPE_THETA**-exponent
        self.columns: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {
            place: [] for place in itertools.product(range(LAYERS), range(KV_HEADS))
        }

    def drop(self, keep: Tensor) -> None:
        for (layer, head), rows in self.columns.items():
            self.columns[layer, head] = [
                row for row, kept in zip(rows, keep[layer, head].tolist(), strict=True) if kept
            ]

    def logits(self, token: int, position: int) -> Tensor:
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer in range(LAYERS):
            hidden = self._layer(layer, hidden, position)
        return self.weights["lm_head.weight"] @ self._norm(hidden, "model.norm.weight")

    def _layer(self, layer: int, hidden: Tensor, position: int) -> Tensor:
        name = f"model.layers.{layer}."
        normed = self._norm(hidden, name + "input_layernorm.weight")
        query = (self.weights[name + "self_attn.q_proj.weight"] @ normed).view(-1, HEAD_DIM)
        key = (self.weights[name + "self_attn.k_proj.weight"] @ normed).view(-1, HEAD_DIM)
        value = (self.weights[name + "self_attn.v_proj.weight"] @ normed).view(-1, HEAD_DIM)
        for head in range(KV_HEADS):
            self.columns[layer, head].append((self._rotate(key[head], position), value[head]))
        outputs = []
        for query_head in range(QUERY_HEADS):
            rotated = self._rotate(query[query_head], position)
            rows = self.columns[layer, query_head // GROUP]
            powers = [math.exp(float(rotated @ k) / math.sqrt(HEAD_DIM)) for k, _ in rows]
            output = torch.zeros(HEAD_DIM).double()
            for power, (_, v) in zip(powers, rows, strict=True):
                output += power / sum(powers) * v
            outputs.append(output)
        hidden = hidden + self.weights[name + "self_attn.o_proj.weight"] @ torch.cat(outputs)
        normed = self._norm(hidden, name + "post_attention_layernorm.weight")
        gate = self.weights[name + "mlp.gate_proj.weight"] @ normed
        up = self.weights[name + "mlp.up_proj.weight"] @ normed
        return hidden + self.weights[name + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return self.weights[name] * hidden / (hidden.square().mean() + self.eps).sqrt()

    def _rotate(self, row: Tensor, position: int) -> Tensor:
        """RoPE as a product of complex numbers: dims (i, i + D/2) are one of them."""
        half = HEAD_DIM // 2
        turned = torch.complex(row[:half], row[half:]) * torch.polar(
            torch.ones(half).double(), position * self.frequencies
        )
        return torch.cat([turned.real, turned.imag])


@pytest.fixture
def reference(model_dir: Path, prompt: list[int]) -> OneTokenAtATime:
    """After the whole prompt but its last token."""
    one_token = OneTokenAtATime(LlamaForCausalLM.from_pretrained(model_dir))
    for position, token in enumerate(prompt[:-1]):
        one_token.logits(token, position)
    return one_token


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps]


@pytest.mark.parametrize("module", [oracle_module, oracle_keep_module, oracle_tails_module])
def test_imports_nothing_from_the_plugin(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).split(".")[0])
    assert "torch" in roots
    assert not roots & {"lava_sglang", "kernels", "patches", "sglang"}


@pytest.mark.parametrize("everything", [None, torch.ones(LAYERS, KV_HEADS, PROMPT_LEN).bool()])
def test_without_dropping_equals_generate(
    oracle: Oracle,
    model_dir: Path,
    prompt: list[int],
    prefill: Prefill,
    everything: Tensor | None,
) -> None:
    stock: Any = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generated = stock.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, PROMPT_LEN, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )[0, PROMPT_LEN:].tolist()
    assert len(set(generated)) > NEW_TOKENS // 2
    assert tokens_of(oracle.greedy(prefill, everything, NEW_TOKENS)) == generated


def test_masking_equals_dropping_the_rows(
    oracle: Oracle,
    prompt: list[int],
    prefill: Prefill,
    ragged_keep: Tensor,
    reference: OneTokenAtATime,
) -> None:
    steps = oracle.greedy(prefill, ragged_keep, NEW_TOKENS)

    logits = reference.logits(prompt[-1], PROMPT_LEN - 1)
    reference.drop(ragged_keep)
    for index, step in enumerate(steps):
        best, second = logits.topk(2).values.tolist()
        assert step.token == int(logits.argmax())
        assert step.margin == pytest.approx(best - second, abs=1e-4)
        logits = reference.logits(step.token, PROMPT_LEN + index)

    assert tokens_of(steps) != tokens_of(oracle.greedy(prefill, None, NEW_TOKENS))


def test_prefill_records_keys_values_and_logits(
    prompt: list[int], prefill: Prefill, reference: OneTokenAtATime
) -> None:
    logits = reference.logits(prompt[-1], PROMPT_LEN - 1)
    torch.testing.assert_close(prefill.logits.double(), logits, atol=1e-4, rtol=0)
    for (layer, head), rows in reference.columns.items():
        keys = torch.stack([k for k, _ in rows])
        values = torch.stack([v for _, v in rows])
        torch.testing.assert_close(prefill.keys[layer, head].double(), keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(prefill.values[layer, head].double(), values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", [None, 0, 17])
def test_window_attention_equals_eager_attention(
    oracle: Oracle, model_dir: Path, prompt: list[int], start: int | None
) -> None:
    prefill = oracle.prefill(prompt, WINDOW, start)
    eager = LlamaForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        attentions = eager(torch.tensor([prompt]), output_attentions=True).attentions
    first = PROMPT_LEN - WINDOW if start is None else start
    assert prefill.window_attention.shape == (LAYERS, QUERY_HEADS, PROMPT_LEN)
    for layer, full in enumerate(attentions):
        window = full[0, :, first : first + WINDOW]
        weights = torch.tensor([math.exp(place / 8) for place in range(WINDOW)])
        weighted = torch.einsum("qwi,w->qi", window**2, weights / weights.sum())
        mean, rms = window.mean(dim=1), weighted**0.5
        torch.testing.assert_close(prefill.window_attention[layer], mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(prefill.window_rms[layer], rms, atol=1e-6, rtol=0)


def test_window_queries_reproduce_the_window_attention(prefill: Prefill) -> None:
    assert prefill.window_queries.shape == (LAYERS, QUERY_HEADS, WINDOW, HEAD_DIM)
    for layer, query_head in itertools.product(range(LAYERS), range(QUERY_HEADS)):
        total = torch.zeros(PROMPT_LEN)
        for offset in range(WINDOW):
            seen = PROMPT_LEN - WINDOW + offset + 1
            keys = prefill.keys[layer, query_head // GROUP, :seen]
            scores = keys @ prefill.window_queries[layer, query_head, offset]
            total[:seen] += (scores / math.sqrt(HEAD_DIM)).softmax(dim=0)
        torch.testing.assert_close(
            prefill.window_attention[layer, query_head], total / WINDOW, atol=1e-6, rtol=0
        )


def test_a_decode_leaves_the_prefill_as_it_was(
    oracle: Oracle, prefill: Prefill, ragged_keep: Tensor
) -> None:
    before = oracle.greedy(prefill, None, NEW_TOKENS)
    oracle.greedy(prefill, ragged_keep, NEW_TOKENS)
    assert oracle.greedy(prefill, None, NEW_TOKENS) == before


def test_forcing_its_own_tokens_changes_nothing(
    oracle: Oracle, prefill: Prefill, ragged_keep: Tensor
) -> None:
    free = oracle.greedy(prefill, ragged_keep, NEW_TOKENS)
    assert oracle.greedy(prefill, ragged_keep, NEW_TOKENS, force=tokens_of(free)) == free
    assert oracle.greedy(prefill, ragged_keep, NEW_TOKENS, force=tokens_of(free[:5])) == free
    assert all(step.fed == step.token and step.gap == 0 for step in free)


def test_a_forced_token_is_reported_and_followed(
    oracle: Oracle, prompt: list[int], prefill: Prefill, reference: OneTokenAtATime
) -> None:
    free = oracle.greedy(prefill, None, 3)
    forced = (free[1].token + 1) % VOCABULARY
    steps = oracle.greedy(prefill, None, 3, force=[free[0].token, forced])

    logits = reference.logits(prompt[-1], PROMPT_LEN - 1)
    logits = reference.logits(free[0].token, PROMPT_LEN)
    assert steps[1] == replace(free[1], fed=forced, gap=steps[1].gap)
    assert steps[1].gap == pytest.approx(float(logits.max() - logits[forced]), abs=1e-4)
    assert steps[1].gap >= steps[1].margin
    logits = reference.logits(forced, PROMPT_LEN + 1)
    assert steps[2].token == int(logits.argmax())


def test_stops_at_end_of_sequence(oracle: Oracle, prefill: Prefill) -> None:
    free = oracle.greedy(prefill, None, NEW_TOKENS)
    tokens = tokens_of(free)
    stop = tokens[9]
    stopped = oracle.greedy(prefill, None, NEW_TOKENS, eos_ids=[stop])
    assert stopped == free[: tokens.index(stop) + 1]


def test_a_long_answer_without_a_rule_is_greedy(
    oracle: Oracle, prefill: Prefill, ragged_keep: Tensor
) -> None:
    free = oracle.greedy(prefill, ragged_keep, NEW_TOKENS)
    answer = long_answer(oracle, prefill, ragged_keep, None, tokens_of(free))
    assert len(answer.logprobs) == NEW_TOKENS and (answer.logprobs < 0).all()
    for step, greedy in zip(answer.steps, free, strict=True):
        assert replace(step, margin=greedy.margin) == greedy
        assert step.margin == pytest.approx(greedy.margin, abs=1e-4)
    assert long_answer(oracle, prefill, ragged_keep, None, tokens_of(free)[:1]).steps == free[:1]


@pytest.mark.parametrize("method", ["lava", "snapkv"])
def test_a_long_answer_keeps_as_many_as_before(
    oracle: Oracle, prefill: Prefill, ragged_keep: Tensor, method: Literal["lava", "snapkv"]
) -> None:
    keep = ragged_keep.clone()
    keep[:, :, :5] = True
    rule = Rule(method, prefix_len=5, window_size=4, interval=9)
    said = list(range(NEW_TOKENS))
    steps, logprobs, keeps = long_answer(oracle, prefill, keep, rule, said)
    assert [step.fed for step in steps] == said and len(logprobs) == NEW_TOKENS
    assert [k.shape[2] - PROMPT_LEN for k in keeps] == [0, 10, 20]
    for before, after in itertools.pairwise(keeps):
        assert after[:, :, :5].all() and after[:, :, -4:].all()
        assert not (after[:, :, : before.shape[2]] & ~before).any(), "what is dropped is gone"
        assert torch.equal(after.sum(dim=(1, 2)), before.sum(dim=(1, 2)))
        assert torch.equal(after.sum(dim=2), before.sum(dim=2)) == (method == "snapkv")
    unchosen = long_answer(oracle, prefill, keep, None, said)
    changed = (unchosen.logprobs - logprobs).abs() > 1e-4
    assert changed.nonzero().min() == 11, "the token after the first step on the new choice"


def test_ranks_keep_their_share_each_from_their_own_heads(prefill: Prefill) -> None:
    split = (11, 20, WINDOW)
    kept = per_rank_keep(KEEP["lava"], prefill, KV_HEADS, *split)
    assert (kept.sum(dim=(0, 2)) == LAYERS * (11 + 20)).all()
    assert not torch.equal(kept, KEEP["lava"](prefill, *split))
    alone = per_rank_keep(KEEP["lava"], prefill, 1, *split)
    assert torch.equal(alone, KEEP["lava"](prefill, *split))
    # A head's choice by SnapKV reads nothing of other heads.
    uniform = per_rank_keep(KEEP["snapkv"], prefill, KV_HEADS, *split)
    assert torch.equal(uniform, KEEP["snapkv"](prefill, *split))
    with pytest.raises(ValueError, match="tp_size is 3, must divide 2 KV heads"):
        per_rank_keep(KEEP["snapkv"], prefill, 3, *split)


def test_streamingllm_keeps_sinks_and_the_end(prefill: Prefill) -> None:
    keep = KEEP["streamingllm"](prefill, prefix_len=10, budget=20, window_size=WINDOW)
    expected = [*range(14), *range(PROMPT_LEN - 16, PROMPT_LEN)]
    assert keep.shape == (LAYERS, KV_HEADS, PROMPT_LEN)
    for layer, head in itertools.product(range(LAYERS), range(KV_HEADS)):
        assert keep[layer, head].nonzero().flatten().tolist() == expected


def test_a_budget_of_the_whole_suffix_keeps_everything(prefill: Prefill) -> None:
    assert KEEP["snapkv"](prefill, 10, PROMPT_LEN - 10, WINDOW).all()
    assert KEEP["streamingllm"](prefill, 10, PROMPT_LEN - 10, WINDOW).all()


def test_bad_arguments_are_refused_by_name(
    oracle: Oracle, prompt: list[int], prefill: Prefill, ragged_keep: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"input_ids has 0 tokens"):
        oracle.prefill([], 1)
    with pytest.raises(ValueError, match=r"window_size is 49, must be in \[1, 48\]"):
        oracle.prefill(prompt, PROMPT_LEN + 1)
    with pytest.raises(ValueError, match=r"window_start is 41, must be in \[0, 40\]"):
        oracle.prefill(prompt, WINDOW, 41)
    with pytest.raises(ValueError, match=r"budget is 39, must be in \[8, 38\]"):
        KEEP["snapkv"](prefill, 10, 39, WINDOW)
    with pytest.raises(ValueError, match=r"budget is 7, must be in \[8, 38\]"):
        KEEP["streamingllm"](prefill, 10, 7, WINDOW)
    with pytest.raises(ValueError, match=r"prefix_len is 48, must be in \[0, 47\]"):
        KEEP["snapkv"](prefill, PROMPT_LEN, 1, 1)
    with pytest.raises(ValueError, match=r"window_size is 9, must be 8"):
        KEEP["snapkv"](prefill, 0, 20, 9)
    with pytest.raises(ValueError, match=r"pool_width is 4, must be odd"):
        KEEP["snapkv"](prefill, 0, 20, WINDOW, pool_width=4)
    with pytest.raises(ValueError, match=r"max_new_tokens is 1, must be at least 2"):
        oracle.greedy(prefill, None, 1, force=[1, 2])
    with pytest.raises(ValueError, match=r"must be torch.bool \[2, 2, 48\]"):
        oracle.greedy(prefill, ragged_keep[:, :, 1:], 1)
    with pytest.raises(ValueError, match=r"keep is torch.float32"):
        oracle.greedy(prefill, ragged_keep.float(), 1)


def test_same_tokens_pass_without_exceptions(oracle: Oracle, prefill: Prefill) -> None:
    free = oracle.greedy(prefill, None, NEW_TOKENS)
    assert assert_same_tokens(free, tokens_of(free)) == []


def test_a_near_tie_is_excused_and_the_rest_still_checked() -> None:
    agreed = Step(token=5, margin=1.0, fed=5, gap=0.0)
    near = Step(token=6, margin=0.001, fed=7, gap=0.001)
    far = Step(token=8, margin=0.001, fed=9, gap=0.5)
    assert assert_same_tokens([agreed, near, agreed], [5, 7, 5]) == [(1, 0.001)]
    with pytest.raises(AssertionError, match=r"step 2: the server said 9, the oracle 8"):
        assert_same_tokens([agreed, near, far], [5, 7, 9])
    with pytest.raises(AssertionError, match=r"tolerance 0\.0005"):
        assert_same_tokens([agreed, near], [5, 7], tolerance_margin=0.0005)


def test_steps_must_have_followed_the_server() -> None:
    steps = [Step(token=5, margin=1.0, fed=5, gap=0.0)]
    for server_tokens in ([], [6], [5, 5]):
        with pytest.raises(AssertionError, match="force=server_tokens"):
            assert_same_tokens(steps, server_tokens)
