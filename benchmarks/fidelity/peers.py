# SPDX-License-Identifier: Apache-2.0
"""The presses of NVIDIA kvpress as methods of a run, beside ours: `kvpress:SnapKV` and so on.

A press gets what its own forward hook would hand it: the layer, its input, keys and values. What it
keeps is read off its answer, and goes through the same measurement as our choices.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from attention_inputs import AttentionInputs, LayerInput
from continuation import Columns
from torch import Tensor
from transformers import DynamicCache
from variants import Contender, kept_tokens, parse_options

from lava_sglang.config import KVCompressionConfig
from lava_sglang.tools.inspection.prefill import Prefill

PREFIX = "kvpress"
INSTALL = (
    "python3 -m venv .venv-kvpress && .venv-kvpress/bin/pip install -e '.[plot]' kvpress==0.5.5"
)

# Left out are presses that need training or statistics of the model, change entries rather than
# choose among them, compress while decoding, need all attention of a second pass, or whose budget
# cannot be set.
SCORERS = (
    *("SnapKV", "PyramidKV", "ExpectedAttention", "KeyDiff", "Knorm", "StreamingLLM", "TOVA"),
    *("ObservedAttention", "LagKV", "NonCausalAttn", "CUR", "LeverageScore", "Compactor", "Cap"),
    "Random",
)
WRAPPERS = {
    "AdaKV": "SnapKV",
    "CriticalKV": "SnapKV",
    "CriticalAdaKV": "SnapKV",
    "ChunkKV": "SnapKV",
    "EntropyGatedChunkKV": "SnapKV",
    "Block": "KeyDiff",
}
"""Presses around a scorer -> the scorer, unless the spec names another: `AdaKV+KeyDiff`."""
REPLAYERS = ("KVzip", "KVgrad")
"""Presses that read the prompt again, to repeat it, before they choose."""
DRAWING = ("LeverageScore", "Compactor", "Random")
"""Presses that draw: no two runs of kvpress itself agree."""
_SCORES_BY_BUDGET = ("StreamingLLM", "Compactor")
_SCORES_PARTS = ("Block",)
_NOT_SETTINGS = ("press", "compression_ratio")


class PeerError(ValueError):
    """kvpress is not there, has no such press, or its answer is not a choice of entries."""


@dataclass(frozen=True)
class Peer:
    """A press with its settings; `label` is how it was asked for."""

    label: str
    config: KVCompressionConfig  # turns a fraction into b, as for our own methods
    new_press: Callable[..., Any]  # score_once=False: as kvpress makes it
    needs_attention: bool
    always_kept: int  # the press's window
    draws: bool
    window_size: int = 1  # it makes its own queries

    def kept_tokens(self, budget: float, suffix_len: int) -> int:
        """b, the same number as for our own methods."""
        if budget > 1:  # whatever our window
            return min(int(budget), suffix_len)
        return kept_tokens(self.config, budget, suffix_len)

    @torch.no_grad()
    def choose(
        self, exact: Prefill, inputs: AttentionInputs | None, budgets: Sequence[int]
    ) -> list[Columns | None]:
        """What the press keeps at each budget b; None where b covers the prompt."""
        assert inputs is not None
        wanted = [budget for budget in budgets if budget < exact.prompt_len]
        chosen = self.keep(exact, inputs, wanted) if wanted else {}
        return [chosen.get(budget) for budget in budgets]

    def keep(
        self, exact: Prefill, inputs: AttentionInputs, wanted: Sequence[int]
    ) -> dict[int, Columns]:
        """What the press keeps at budgets that do not cover the prompt, one or more."""
        chosen: dict[int, Columns] = {budget: [] for budget in wanted}
        with rotary_in_layers(inputs):
            for layer in inputs.layers(exact):
                press = self.new_press()  # it scores a layer once, for all budgets
                attention = attention_weights(layer) if self.needs_attention else None
                for budget in wanted:
                    press.compression_ratio = removed_share(budget, exact.prompt_len)
                    chosen[budget] += compress(press, layer, attention)
        return chosen


class ReplayingPeer(Peer):
    """A press that prefills and reads the prompt again by itself; budgets are over all layers."""

    def keep(
        self, exact: Prefill, inputs: AttentionInputs, wanted: Sequence[int]
    ) -> dict[int, Columns]:
        chosen: dict[int, Columns] = {}
        press = self.new_press()
        compress_once = press.compress_post

        def compress_post(model: Any) -> None:
            """At the press's end: its scores serve all budgets."""
            for budget in wanted:
                press.compression_ratio = removed_share(budget, exact.prompt_len, -0.0001)
                compress_once(model)
                chosen[budget] = [
                    column
                    for module in inputs.modules
                    for column in unmasked(module, exact.arena.shape[3], exact.prompt_len)
                ]

        press.compress_post = compress_post
        press.compression_ratio = removed_share(wanted[0], exact.prompt_len)
        with rotary_in_layers(inputs), stock_attention(inputs.model), press(inputs.model):
            tokens = inputs.tokens(exact)
            inputs.model.model(input_ids=tokens, past_key_values=DynamicCache())
        return chosen


def parse_peers(spec: str, settings: Mapping[str, Any] | None = None) -> list[Peer]:
    """Peers of specs such as `kvpress:SnapKV`, `kvpress:AdaKV+KeyDiff`,
    `kvpress:SnapKV:window_size=32,kernel_size=7`; all with kvpress's own defaults for `kvpress`.

    settings: fields of KVCompressionConfig for all methods of a run; only b is made of them.
    Raises PeerError.
    """
    if spec == PREFIX:
        return [
            peer
            for name in (*SCORERS, *WRAPPERS, *REPLAYERS)
            for peer in parse_peers(f"{PREFIX}:{name}", settings)
        ]
    names, _, options = spec.removeprefix(f"{PREFIX}:").partition(":")
    outer, plus, inner = names.partition("+")
    presses = (*SCORERS, *WRAPPERS, *REPLAYERS)
    known = (outer in WRAPPERS and inner in SCORERS) if plus else outer in presses
    if not known:
        raise PeerError(
            f"{spec}: accepts {PREFIX}:PRESS, of {', '.join(presses)}; "
            f"and WRAPPER+PRESS, of {', '.join(WRAPPERS)} around {', '.join(SCORERS)}"
        )
    chain = [outer, inner or WRAPPERS[outer]] if outer in WRAPPERS else [outer]
    classes = [_press_class(spec, name) for name in chain]
    own = _settings_by_class(spec, classes, parse_options(options))

    def new_press(score_once: bool = True) -> Any:
        press = classes[-1](**own[-1])
        if score_once and not {*chain} & {*_SCORES_BY_BUDGET, *_SCORES_PARTS, *REPLAYERS}:
            _score_once(press)
        return press if len(classes) == 1 else classes[0](press=press, **own[0])

    config = KVCompressionConfig.parse({**(settings or {})}, f"{spec}: {{}}".format)
    kind = ReplayingPeer if outer in REPLAYERS else Peer
    scorer = classes[-1](**own[-1])
    return [
        kind(
            spec,
            config,
            new_press,
            needs_attention=chain[-1] == "ObservedAttention",
            always_kept=getattr(scorer, "window_size", 0),
            draws=chain[-1] in DRAWING,
        )
    ]


@contextmanager
def recorded(model: Any, contenders: Iterable[Contender]) -> Iterator[AttentionInputs | None]:
    """The inputs of the prefill within, where one of the contenders is a peer; else None."""
    if not any(isinstance(contender, Peer) for contender in contenders):
        yield None
        return
    with AttentionInputs(model).recording() as inputs:
        yield inputs


def removed_share(kept: int, prompt_len: int, excess: float = 0.01) -> float:
    """The compression ratio at which a press keeps `kept` of `prompt_len` entries, whether it
    truncates or rounds N * (1 - ratio). One that truncates what it drops needs excess < 0."""
    return 1 - (kept + excess) / prompt_len


def compress(press: Any, layer: LayerInput, attention: Tensor | None) -> Columns:
    """What the press keeps of a layer's prompt: tokens of each of the H heads, ascending.

    Presses that differ from head to head keep all entries and name those to mask in the module.
    """
    module = layer.module
    module.masked_key_indices = None
    devices = [layer.keys.device] if layer.keys.is_cuda else []
    with torch.random.fork_rng(devices):  # some draw: the same in every run and at every budget
        torch.manual_seed(int(module.layer_idx))
        keys, values = press.compress(
            module,
            layer.hidden,
            layer.keys,
            layer.values,
            attention,
            {"position_embeddings": layer.rotary},
        )
    if module.masked_key_indices is None:
        tokens = copied_rows(keys[0], layer.keys[0])
        if tokens is None or copied_rows(values[0], layer.values[0], tokens) is None:
            raise PeerError(
                f"{type(press).__name__}: changes entries, which no choice of ours does"
            )
        return list(tokens.sort(dim=1).values)
    return unmasked(module, *layer.keys.shape[1:3])


def unmasked(module: Any, heads: int, prompt_len: int) -> Columns:
    """What is left of the entries that a press has named in the module, and names no longer."""
    masked, module.masked_key_indices = module.masked_key_indices, None
    keep = torch.ones(heads, prompt_len, dtype=torch.bool, device=module.q_proj.weight.device)
    if masked is not None:
        keep[masked[1].to(keep.device), masked[2].to(keep.device)] = False
    return [head.nonzero()[:, 0] for head in keep]


@contextmanager
def rotary_in_layers(inputs: AttentionInputs) -> Iterator[None]:
    """Each attention layer has the model's RoPE, where presses look for it; kvpress leaves it."""
    before = [getattr(module, "rotary_emb", None) for module in inputs.modules]
    for module in inputs.modules:
        module.rotary_emb = inputs.rotary_emb
    try:
        yield
    finally:
        for module, own in zip(inputs.modules, before, strict=True):
            if own is None:
                del module.rotary_emb
            else:
                module.rotary_emb = own


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """A model of `load_model` as transformers runs it, with a KV cache of its own."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def copied_rows(kept: Tensor, rows: Tensor, at: Tensor | None = None) -> Tensor | None:
    """int64 [H, n]: which of `rows` [H, N, D] each row of `kept` [H, n, D] is a copy of.

    at: where they are to be, if that is known. None if they are no copies, or one is there twice.
    """
    if at is None:
        marks, order = _fingerprints(rows).sort(dim=1)
        found = torch.searchsorted(marks, _fingerprints(kept)).clamp(max=rows.shape[1] - 1)
        at = order.gather(1, found)
    copies = rows.gather(1, at[:, :, None].expand_as(kept))
    twice = (at.sort(dim=1).values.diff(dim=1) == 0).any()
    return None if twice or not torch.equal(copies, kept) else at


def attention_weights(layer: LayerInput) -> Tensor:
    """[1, Q, N, N]: the causal softmax that transformers' eager attention returns."""
    module = layer.module
    count, dim = layer.hidden.shape[1], layer.keys.shape[3]
    cos, sin = (part[:, None] for part in layer.rotary)
    queries = module.q_proj(layer.hidden).unflatten(2, (-1, dim)).transpose(1, 2)
    first, second = queries.chunk(2, dim=3)
    queries = queries * cos + torch.cat([-second, first], dim=3) * sin
    keys = layer.keys.repeat_interleave(queries.shape[1] // layer.keys.shape[1], dim=1)
    logits = queries @ keys.transpose(2, 3) * module.scaling
    hidden = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill_(hidden, float("-inf")).softmax(3, torch.float32).to(queries.dtype)


def _fingerprints(rows: Tensor) -> Tensor:
    """int64 [H, n] of the bits of rows [H, n, D]: equal for equal rows, whatever the device."""
    bits = rows.contiguous().view(torch.int32 if rows.dtype.itemsize == 4 else torch.int16).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (rows.shape[2],), generator=generator) * 2 + 1
    return (bits * factors.to(rows.device)).sum(dim=2)


def _press_class(spec: str, name: str) -> Any:
    logging.getLogger(PREFIX).setLevel(logging.ERROR)  # it warns at every prompt
    try:
        return getattr(importlib.import_module("kvpress"), f"{name}Press")
    except ImportError as error:
        raise PeerError(f"{spec}: needs kvpress ({error}); {INSTALL}") from error
    except AttributeError:
        raise PeerError(f"{spec}: this kvpress has no {name}Press; {INSTALL}") from None


def _score_once(press: Any) -> None:
    """Its `score` from the first call on answers with copies of the first answer."""
    score, found = press.score, []

    def once(*arguments: Any, **named: Any) -> Tensor:
        if not found:
            found.append(score(*arguments, **named))
        return found[0].clone()

    press.score = once


def _settings_by_class(
    spec: str, classes: Sequence[Any], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Each option to the first class that has it."""
    accepted = [
        [name for name in inspect.signature(cls).parameters if name not in _NOT_SETTINGS]
        for cls in classes
    ]
    own: list[dict[str, Any]] = [{} for _ in classes]
    for field, value in options.items():
        places = [place for place, names in enumerate(accepted) if field in names]
        if not places:
            names = ", ".join(name for names in accepted for name in names)
            raise PeerError(f"{spec}: {field}={value!r}: accepts {names}")
        own[places[0]][field] = value
    return own
