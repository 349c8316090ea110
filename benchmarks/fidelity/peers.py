# SPDX-License-Identifier: Apache-2.0
"""The presses of NVIDIA kvpress beside ours, run as kvpress's own pipeline runs them.

kvpress prefills and compresses by its hooks, and attends by its patch of transformers' attention;
our part is the tokens that are fed and the number of entries that are kept. What its pipeline lacks
is teacher forcing: it only generates.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.fidelity.methods import Row, kept_tokens, parse_options
from lava_sglang.config import KVCompressionConfig

PREFIX = "kvpress"
INNER = "SnapKV"
"""The press inside one that goes around another, unless a spec names it."""

INSTALL = (
    "python3 -m venv .venv-kvpress && .venv-kvpress/bin/pip install -e '.[plot]' kvpress==0.5.5"
)
_ATTENTION = {"ObservedAttention": "eager"}  # it reads the weights, which only eager returns


class PeerError(ValueError):
    """kvpress is not there, or has no such press or setting."""


class Peer(NamedTuple):
    """A press with its settings; `label` is how it was asked for."""

    label: str
    press: Any  # kvpress's; every prefill sets what it keeps
    config: KVCompressionConfig  # turns a fraction into b, as for our own methods
    attention: str  # transformers' implementation that it runs on
    window_size: int  # the prompt's last tokens that every budget includes

    def kept_tokens(self, budget: float, suffix_len: int) -> int:
        """b, the same number as for our own methods."""
        if budget > 1:  # whatever our window
            return min(int(budget), suffix_len)
        return kept_tokens(self.config, budget, suffix_len)


@torch.no_grad()
def rows(
    model: Any, prompt: Sequence[int], fed: Sequence[int], pairs: Iterable[tuple[Peer, float]]
) -> Iterator[Row]:
    """As `methods.rows`, with a prefill for each pair. model: of `load_model`."""
    from transformers import DynamicCache

    tokens, continuation = (torch.tensor([list(ids)], device=model.device) for ids in (prompt, fed))
    positions = torch.arange(len(prompt), len(prompt) + len(fed), device=model.device)[None]
    for peer, budget in pairs:
        size = peer.kept_tokens(budget, len(prompt))
        peer.press.compression_ratio = removed_share(size, len(prompt))
        cache = DynamicCache()
        with _attention(model, peer.attention), torch.random.fork_rng():
            torch.manual_seed(0)  # some presses draw
            with peer.press(model):
                model.model(input_ids=tokens, past_key_values=cache)
            kept = mean_kept(model, cache)
            output = model(input_ids=continuation, past_key_values=cache, position_ids=positions)
        yield Row(peer.label, budget, kept, output.logits[0])


def removed_share(kept: int, prompt_len: int) -> float:
    """The compression ratio at which a press keeps `kept` of `prompt_len` entries, whether it
    truncates or rounds N * (1 - ratio)."""
    return 1 - min(kept + 0.01, prompt_len) / prompt_len


def mean_kept(model: Any, cache: Any) -> float:
    """Entries per layer and head that a press left, less those that it only masks."""
    left = heads = 0
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        masked = getattr(block.self_attn, "masked_key_indices", None)
        left += layer.keys.shape[1] * layer.keys.shape[2]
        left -= 0 if masked is None else len(masked[0])
        heads += layer.keys.shape[1]
    whole, rest = divmod(left, heads)
    return whole if rest == 0 else round(left / heads, 4)


def parse_peer(spec: str, settings: Mapping[str, Any] | None = None) -> Peer:
    """The peer of a spec such as `kvpress:SnapKV`, `kvpress:AdaKV+KeyDiff` or
    `kvpress:SnapKV:window_size=32,kernel_size=7`.

    settings: fields of KVCompressionConfig for all methods of a run; only b is made of them.
    Raises PeerError.
    """
    names, _, options = spec.removeprefix(f"{PREFIX}:").partition(":")
    outer, _, inner = names.partition("+")
    chain = [_press_class(spec, outer)]
    if "press" in inspect.signature(chain[0]).parameters:
        chain.append(_press_class(spec, inner or INNER))
    elif inner:
        raise PeerError(f"{spec}: {outer} goes around no other press")
    own = _settings_by_class(spec, chain, parse_options(options))
    scorer = chain[-1](**own[-1])
    config = KVCompressionConfig.parse({**(settings or {})}, f"{spec}: {{}}".format)
    return Peer(
        spec,
        scorer if len(chain) == 1 else chain[0](press=scorer, **own[0]),
        config,
        _ATTENTION.get(inner or outer, "sdpa"),
        getattr(scorer, "window_size", 0),
    )


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    """A model of `load_model` as transformers runs it."""
    ours = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def _press_class(spec: str, name: str) -> Any:
    logging.getLogger(PREFIX).setLevel(logging.ERROR)  # it warns at every prompt
    try:
        return getattr(importlib.import_module(PREFIX), f"{name}Press")
    except ImportError as error:
        raise PeerError(f"{spec}: needs kvpress ({error}); {INSTALL}") from error
    except AttributeError:
        raise PeerError(f"{spec}: kvpress has no {name}Press") from None


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


_NOT_SETTINGS = ("press", "compression_ratio")
