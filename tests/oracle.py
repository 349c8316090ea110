# SPDX-License-Identifier: Apache-2.0
"""Owns the independent oracle: greedy decoding in transformers under per-KV-head keep masks.

It shares no code with the plugin it judges. Nothing is evicted here: every prompt entry stays in
memory at its true position, and a dropped entry is one whose attention score is minus infinity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

# Logits. Measured on SmolLM2-135M, 300 to 2,800 tokens, top-2 margins: float32 against float64 and
# against SGLang's CPU server 2e-5, RoPE frequencies moved by one ulp 2e-4. Ten times the worst, and
# a sixth of the smallest gap (0.012) that a wrong keep mask opened where tokens first differed.
ROUNDING_MARGIN = 2e-3


@dataclass(frozen=True)
class Prefill:
    """One prompt of I tokens after a full forward pass; decodes read it and never change it.

    L layers, H KV heads, Q query heads, D head dim, w window tokens; all in the dtype of the model.
    """

    input_ids: list[int]
    window_start: int
    keys: Tensor  # [L, H, I, D], after RoPE
    values: Tensor  # [L, H, I, D]
    logits: Tensor  # [vocabulary], of the last prompt token
    window_queries: Tensor  # [L, Q, w, D], after RoPE
    window_attention: Tensor  # [L, Q, I], mean over the w window queries of the causal softmax
    window_rms: Tensor  # [L, Q, I], its root mean square, query t weighted by exp(t / 8)
    reach: list[int | None]  # [L], the last tokens that one sees, itself included; None: all


@dataclass(frozen=True)
class Step:
    """One decoded position: what the oracle would say, and what was said instead if forced."""

    token: int  # argmax of the logits
    margin: float  # best logit minus second best
    fed: int  # the token the next step continues from: `token`, or the forced one
    gap: float  # best logit minus the logit of `fed`; 0 when they agree


class How(NamedTuple):
    """How a layer attends."""

    scale: float  # on the logits
    reach: int | None = None  # the last tokens that one sees, itself included; None: all
    cap: float | None = None  # logits are cap * tanh(logits / cap)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., q, k] of query [..., q, D] and key [..., k, D]."""
        logits = query @ key.mT * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def unseen(self, query_places: Tensor, key_places: Tensor) -> Tensor:
        """Bool [q, k], of queries and keys at these places of the text."""
        distance = query_places[:, None] - key_places
        hidden = distance < 0
        return hidden if self.reach is None else hidden | (distance >= self.reach)


class Pass(Protocol):
    """What attends, and records, in each layer of a forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Attention output [q, Q, D] of query [Q, q, D] over key and value [H, q, D]."""


class _PrefillPass:
    """Attention of the whole prompt; records what a `Prefill` holds, layer by layer."""

    def __init__(self, window: slice) -> None:
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.rms: list[Tensor] = []
        self.reach: list[int | None] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        self.reach.append(how.reach)
        self.keys.append(key)
        self.values.append(value)
        self.queries.append(query[:, self.window].clone())
        mean, rms = window_attention(query[:, self.window], key, self.window.start, how)
        self.attention.append(mean)
        self.rms.append(rms)
        places = torch.arange(query.shape[1])
        if how.cap is None:
            plain = how.reach is None
            output = torch.nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None],
                None if plain else ~how.unseen(places, places),
                is_causal=plain, scale=how.scale, enable_gqa=True,
            )  # fmt: skip
            return output[0].transpose(0, 1)
        unseen, group = how.unseen(places, places), len(query) // len(key)
        heads = [
            how.logits(own, key[head // group]).masked_fill(unseen, -math.inf).softmax(dim=1)
            @ value[head // group]
            for head, own in enumerate(query)
        ]
        return torch.stack(heads, dim=1)


class _DecodePass:
    """Attention of one new token over kept prompt entries and every generated entry."""

    def __init__(self, prefill: Prefill, keep: Tensor | None) -> None:
        self.prefill = prefill
        self.keep = keep
        layers = prefill.keys.shape[0]
        self.tail_keys: list[list[Tensor]] = [[] for _ in range(layers)]  # [H, 1, D] a token
        self.tail_values: list[list[Tensor]] = [[] for _ in range(layers)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        self.tail_keys[layer].append(key)
        self.tail_values[layer].append(value)
        heads, _, dim = key.shape
        grouped = query.view(heads, -1, dim)  # [H, G, D]: query head h*G + g reads KV head h
        prompt_scores = how.logits(grouped, self.prefill.keys[layer])  # [H, G, I]
        if self.keep is not None:
            prompt_scores.masked_fill_(~self.keep[layer][:, None, :], -math.inf)
        tail_scores = how.logits(grouped, torch.cat(self.tail_keys[layer], dim=1))
        scores = torch.cat([prompt_scores, tail_scores], dim=2)
        places = torch.arange(scores.shape[2])
        scores.masked_fill_(how.unseen(places[-1:], places), -math.inf)
        weights = scores.softmax(dim=2)
        prompt_len = prompt_scores.shape[2]
        output = weights[:, :, :prompt_len] @ self.prefill.values[layer]
        output += weights[:, :, prompt_len:] @ torch.cat(self.tail_values[layer], dim=1)
        return output.reshape(1, -1, dim)


def window_attention(queries: Tensor, key: Tensor, first: int, how: How) -> tuple[Tensor, Tensor]:
    """The mean and the weighted quadratic mean of consecutive queries' attention, [Q, I] each.

    queries: [Q, w, D], of tokens `first` and on; each sees itself and what is before it. key:
    [H, I, D]. The quadratic mean weighs query t by exp(t / 8).
    """
    num_queries, prompt_len = queries.shape[1], key.shape[1]
    group = len(queries) // len(key)
    future = torch.arange(prompt_len) > torch.arange(first, first + num_queries)[:, None]  # [w, I]
    weights = torch.arange(num_queries, dtype=key.dtype).div(8).exp()
    weights /= weights.sum()
    means, quadratic_means = [], []
    for head in range(len(queries)):
        scores = how.logits(queries[head], key[head // group])
        attention = scores.masked_fill(future, -math.inf).softmax(dim=1)
        means.append(attention.mean(dim=0))
        quadratic_means.append((weights @ attention.square()).sqrt())
    return torch.stack(means), torch.stack(quadratic_means)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    oracle_pass: Pass,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapts transformers' attention call (batch of one) to the pass in progress."""
    layer, how = int(module.layer_idx), How(scaling, sliding_window, softcap)
    return oracle_pass.attend(layer, query[0], key[0], value[0], how)[None], None


ATTENTION = "keep_mask_oracle"
AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True)
class Entries:
    """How a cache stores its entries: in `dtype`, divided by their layer's scale."""

    dtype: torch.dtype
    scales: Sequence[float]

    def stored(self, layer: int, numbers: Tensor) -> Tensor:
        """What is read back of `numbers`."""
        scale = self.scales[layer]
        return (numbers / scale).to(self.dtype).to(numbers.dtype) * scale


@dataclass
class _Stored:
    """A pass over entries as a cache stores them, those of the tokens that attend too."""

    inner: Pass
    entries: Entries

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        key, value = (self.entries.stored(layer, numbers) for numbers in (key, value))
        return self.inner.attend(layer, query, key, value, how)


class Oracle:
    """A model directory on the CPU, of rotary attention; `tokenizer` is None if it has none.

    entries: how its cache stores keys and values; None: as the model computes them.
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        entries: Entries | None = None,
    ) -> None:
        self.entries = entries
        self.model: Any = self.load(model_dir, dtype)
        has_tokenizer = (Path(model_dir) / "tokenizer_config.json").exists()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir) if has_tokenizer else None

    def load(self, model_dir: str | Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        ).eval()

    @torch.no_grad()
    def prefill(
        self, input_ids: Sequence[int], window_size: int, window_start: int | None = None
    ) -> Prefill:
        """Runs the prompt once, exactly. The window is `window_size` tokens from `window_start`,
        by default the last ones."""
        prompt_len = len(input_ids)
        if prompt_len < 1:
            raise ValueError(f"input_ids has {prompt_len} tokens, must have at least 1")
        if not 1 <= window_size <= prompt_len:
            raise ValueError(f"window_size is {window_size}, must be in [1, {prompt_len}]")
        latest = prompt_len - window_size
        start = latest if window_start is None else window_start
        if not 0 <= start <= latest:
            raise ValueError(f"window_start is {window_start}, must be in [0, {latest}]")

        record = _PrefillPass(slice(start, start + window_size))
        logits = self.forward(list(input_ids), 0, record)[-1]
        return Prefill(
            input_ids=list(input_ids),
            window_start=start,
            keys=torch.stack(record.keys),
            values=torch.stack(record.values),
            logits=logits,
            window_queries=torch.stack(record.queries),
            window_attention=torch.stack(record.attention),
            window_rms=torch.stack(record.rms),
            reach=record.reach,
        )

    @torch.no_grad()
    def greedy(
        self,
        prefill: Prefill,
        keep: Tensor | None,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        force: Sequence[int] | None = None,
    ) -> list[Step]:
        """Decodes up to `max_new_tokens` tokens, or to the first fed token in `eos_ids`.

        keep: bool [L, H, I], the prompt entries that steps after the first attend to (None: all).
        The first token comes from the exact prompt. The token of step s sits at position I + s.
        force: tokens fed in place of the argmax, from step 0; after its end decoding is free.
        """
        forced = list(force or ())
        if max_new_tokens < max(1, len(forced)):
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, must be at least {max(1, len(forced))}"
            )
        if keep is not None and (keep.dtype, keep.shape) != (torch.bool, prefill.values.shape[:3]):
            raise ValueError(
                f"keep is {keep.dtype} {list(keep.shape)}, "
                f"must be torch.bool {list(prefill.values.shape[:3])}"
            )
        decode = _DecodePass(prefill, keep)
        logits = prefill.logits
        steps: list[Step] = []
        for index in range(max_new_tokens):
            steps.append(step_of(logits, forced[index] if index < len(forced) else None))
            fed = steps[-1].fed
            if fed in eos_ids or index + 1 == max_new_tokens:
                break
            logits = self.forward([fed], len(prefill.input_ids) + index, decode)[-1]
        return steps

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[int], position: int, oracle_pass: Pass, num_logits: int = 1
    ) -> Tensor:
        """Logits [num_logits, vocabulary] of the last of `tokens`, whose first is at `position`."""
        if self.entries is not None:
            oracle_pass = _Stored(oracle_pass, self.entries)
        output = self.model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.arange(position, position + len(tokens))[None],
            use_cache=False,
            logits_to_keep=num_logits,
            oracle_pass=oracle_pass,
        )
        logits: Tensor = output.logits[0]
        return logits


def step_of(logits: Tensor, forced: int | None) -> Step:
    """logits: [vocabulary]. forced: the token said in place of the argmax, if any."""
    best, second = logits.topk(2).values.tolist()
    token = int(logits.argmax())
    fed = token if forced is None else forced
    return Step(token=token, margin=best - second, fed=fed, gap=best - float(logits[fed]))


def assert_same_tokens(
    oracle_steps: Sequence[Step],
    server_tokens: Sequence[int],
    tolerance_margin: float = ROUNDING_MARGIN,
) -> list[tuple[int, float]]:
    """Asserts that every server token is the oracle's choice, up to float32 rounding.

    oracle_steps: from `greedy(..., force=server_tokens)`, so each step saw the server's own past
    and one near tie does not excuse what follows it.
    Returns the excused steps as (step, gap): the oracle's best logit minus that of the server's
    token, never less than the oracle's top-2 margin.
    """
    fed = [step.fed for step in oracle_steps]
    assert fed == list(server_tokens), (
        f"the oracle was fed {fed}, the server said {list(server_tokens)}: "
        "decode the oracle with force=server_tokens"
    )
    excused = []
    for index, step in enumerate(oracle_steps):
        if step.fed == step.token:
            continue
        assert step.gap <= tolerance_margin, (
            f"step {index}: the server said {step.fed}, the oracle {step.token}, "
            f"whose logit is {step.gap:.6f} higher (tolerance {tolerance_margin})"
        )
        excused.append((index, step.gap))
    return excused
