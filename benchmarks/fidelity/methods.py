# SPDX-License-Identifier: Apache-2.0
"""The methods that a run compares, by name or of a file, and what each makes of a prompt."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.fidelity.teacher_forcing import Columns, continuations, kept_columns
from lava_sglang import policy
from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.methods import METHODS
from lava_sglang.policy import Method, method_of
from lava_sglang.tools.inspection.prefill import Prefill


class Variant(NamedTuple):
    """A method with its settings; `label` is how it was asked for."""

    label: str
    method: Method

    @property
    def window_size(self) -> int:
        """The prompt's last tokens: it reads their queries, and every budget includes them."""
        return self.method.config.window_size

    def kept_tokens(self, budget: float, suffix_len: int, layers: LayerMap) -> int:
        return kept_tokens(self.method.config, budget, suffix_len, layers)


def kept_tokens(
    config: KVCompressionConfig, budget: float, suffix_len: int, layers: LayerMap | None = None
) -> int:
    """b, as a server with pages of one token computes it; the suffix's length if it is less."""
    settings = config.model_dump() | {"budget": budget}
    parsed = KVCompressionConfig.parse(settings, "{} of a variant".format)
    return next(iter(parsed.rungs(suffix_len, 1, layers)), suffix_len)


def parse_variants(
    specs: Iterable[str],
    settings: Mapping[str, Any] | None = None,
    methods_from: Path | None = None,
) -> list[Variant]:
    """Variants of specs such as `lava` and `lava:pool_width=15,window_size=64`.

    settings: fields of KVCompressionConfig for all of them; a spec's own come on top.
    methods_from: a Python file that adds methods of its own to `lava_sglang.methods.METHODS`.
    Raises ValueError or KVCompressionError naming the value and what is accepted.
    """
    if methods_from is not None:
        _import(methods_from)
    return [_parse(spec, settings or {}) for spec in specs]


def _import(path: Path) -> None:
    """Run a Python file once, as a module of its name: where the table finds its classes."""
    if path.stem in sys.modules:
        return
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    sys.modules[path.stem] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


class Row(NamedTuple):
    """The logits that a choice of entries gives for the tokens after a prompt."""

    label: str
    budget: float  # as it was asked for
    kept_tokens: float  # entries per layer and head
    logits: Tensor  # [T, vocabulary]


def rows(
    model: Any,
    exact: Prefill,
    fed: Sequence[int],
    pairs: Iterable[tuple[Variant, float]],
    batch_tokens: int,
) -> Iterator[Row]:
    """A row for each pair over T tokens `fed` after the prompt; equal kept sizes are run once.

    batch_tokens: new tokens in a forward pass, those of all rows together.
    """
    variants: dict[str, Variant] = {}
    budgets: dict[tuple[str, int], list[float]] = {}
    for variant, budget in pairs:
        size = variant.kept_tokens(budget, exact.prompt_len, exact.layers)
        variants[variant.label] = variant
        budgets.setdefault((variant.label, size), []).append(budget)
    choices: dict[tuple[str, int], Columns | None] = {}
    for label, variant in variants.items():
        sizes = [size for name, size in budgets if name == label]
        kept = choose(variant, exact, sizes)
        choices |= {(label, size): columns for size, columns in zip(sizes, kept, strict=True)}
    for (label, size), logits in continuations(model, exact, fed, choices, batch_tokens):
        for budget in budgets[label, size]:
            yield Row(label, budget, size, logits)


def choose(
    variant: Variant, prefill: Prefill, budgets: Sequence[int], shared_prefix_len: int = 0
) -> list[Columns | None]:
    """What the variant keeps of a prompt at each budget b; None where b covers the suffix.

    The calls that the server makes: `score_prompt` and `select_entries` of `lava_sglang.policy`.
    """
    suffix_len = prefill.prompt_len - shared_prefix_len
    if all(budget >= suffix_len for budget in budgets):
        return [None] * len(budgets)
    prompt = prefill.view(variant.method.config.window_size, shared_prefix_len)
    scores = policy.score_prompt(variant.method, prompt)
    return [
        None
        if budget >= suffix_len
        else kept_columns(
            policy.select_entries(variant.method, scores, prompt, budget), shared_prefix_len
        )
        for budget in budgets
    ]


def _parse(spec: str, settings: Mapping[str, Any]) -> Variant:
    name, _, options = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"method {name!r}: accepts {', '.join(METHODS)}")
    own = parse_options(options)
    config = KVCompressionConfig.parse({**settings, **own, "method": name}, f"{name}: {{}}".format)
    return Variant(spec, method_of(config))


def parse_options(text: str) -> dict[str, Any]:
    """The settings of `FIELD=VALUE,FIELD=VALUE`, values as in JSON. Raises ValueError."""
    return dict(_option(option) for option in text.split(",") if option)


def _option(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: accepts FIELD=VALUE, as in lava:pool_width=15")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def parse_budgets(text: str) -> list[float]:
    """Budgets of a comma-separated list: tokens above 1, else a fraction of the suffix."""
    budgets = []
    for item in text.split(","):
        try:
            value = float(item)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or (value > 1 and value != int(value)):
            raise ValueError(
                f"budget {item!r}: accepts a fraction in (0, 1] or a whole number of tokens"
            )
        budgets.append(value if value <= 1 else int(value))
    return budgets
