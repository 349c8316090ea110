# SPDX-License-Identifier: Apache-2.0
"""The frozen settings of KV compression, and the errors a bad value gets.

A setting has one home: `method`, `budget` and `min_tokens` are command-line options of their
own, the rest are keys of `--kv-compression-config`. A request may override `enabled`, `method`
and `budget` in `custom_params["kv_compression"]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

RAGGED_METHODS = ("lava", "lava_span", "adakv", "pyramidkv")
"""Methods that keep their own number of entries in every layer and head: any of them needs the
server to have been started with one, for its decode backend."""

UNIFORM_METHODS = ("snapkv", "streamingllm", "random")
"""Methods that keep the same number of entries everywhere: any decode backend reads them."""

POOLED_HEAD_METHODS = ("lava", "lava_span", "adakv")
"""Methods in which the heads of a layer compete for its entries: `head_floor` has a meaning."""

METHOD_CHOICES = ("none", *RAGGED_METHODS, *UNIFORM_METHODS)

DECODE_BACKENDS = {"triton": "lava", "flashinfer": "lava_flashinfer"}
"""Decode kernel -> name of our attention backend: only these decode ragged requests on a GPU."""

Scope = Literal["suffix", "prompt", "auto"]
Trigger = Literal["always", "pressure"]
DecodeKernel = Literal["triton", "flashinfer"]

_ACCEPTS = {
    "method": f"one of {', '.join(METHOD_CHOICES[1:])}",
    "budget": "a fraction of the suffix in (0, 1], or a whole number of tokens above window_size; "
    "or a ladder of fractions or of numbers, each below the one before, such as 0.5,0.25,0.125",
    "min_tokens": "a whole number of tokens from 1 up",
    "window_size": "a whole number of tokens from 1 to 1024",
    "pool_width": "an odd number of tokens from 1 to 63",
    "sink_tokens": "a whole number of tokens from 0 up",
    "scope": "'suffix', 'prompt' or 'auto'",
    "trigger": "'always' or 'pressure'",
    "decode_interval": "a whole number of tokens above window_size, or null",
    "admit_ahead": "true or false",
    "seed": "a whole number from 0 to 2**63 - 1",
    "uniform_layers": "true or false",
    "uniform_heads": "true or false",
    "head_floor": "a share from 0 to 1, with one of the methods "
    f"{', '.join(POOLED_HEAD_METHODS)} and without uniform_heads",
    "decode_kernel": "'triton' or 'flashinfer'",
    "enabled": "true or false",
}


def _ladder(budget: Any) -> Any:
    """One number or a list of them as a tuple of floats; anything else as it is."""
    rungs = budget if isinstance(budget, list | tuple) else [budget]
    if rungs and all(isinstance(rung, int | float) and rung is not True for rung in rungs):
        return tuple(float(rung) for rung in rungs)
    return budget


Ladder = Annotated[tuple[float, ...], BeforeValidator(_ladder)]
"""Budgets, the highest first; one number is a ladder of one."""


class KVCompressionError(ValueError):
    """Settings that cannot be served. `reasons` holds one sentence for each bad value."""

    def __init__(self, reasons: list[str], heading: str | None = None):
        lines = [f"{heading}:", *reasons] if heading else ["; ".join(reasons)]
        super().__init__("\n- ".join(lines))
        self.reasons = reasons


def refuse(reasons: list[str]) -> None:
    """Raises KVCompressionError if there is any reason why a server must not start."""
    if reasons:
        raise KVCompressionError(reasons, heading="KV compression cannot start")


class KVCompressionConfig(BaseModel):
    """What to keep of a prompt, and when. Frozen; equal in every process of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str = "none"
    # Suffixes shorter than this many tokens are served uncompressed.
    min_tokens: int = Field(default=512, ge=1)
    # Last prompt tokens whose queries score the suffix; their own entries are always kept.
    window_size: int = Field(default=32, ge=1, le=1024)
    # Fractions of the suffix up to 1, tokens above it: mean entries kept per layer and KV head.
    # More than one is a ladder: the first that the pool affords, lower when slots are short.
    budget: Ladder = (0.25,)
    # Width in tokens of the max-pool over the scores of lava, snapkv, adakv and pyramidkv.
    pool_width: int = Field(default=7, ge=1, le=63)
    # First suffix tokens that StreamingLLM keeps.
    sink_tokens: int = Field(default=4, ge=0)
    # suffix: a prefix matched in the radix tree stays exact and shared. prompt: all is compressed.
    # auto: a prefix stays exact if others use it.
    scope: Scope = "suffix"
    # always: compressed when prefilled. pressure: exact until slots are short.
    trigger: Trigger = "always"
    # A compressed request's answer longer than this many tokens is compressed too, again and again.
    decode_interval: int | None = None
    # Admit the next prompt into the slots that this pass's compressions are certain to release.
    admit_ahead: bool = False
    # Seed of the random method, a baseline.
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    # Every layer keeps equally many. Changes nothing where the method does so itself.
    uniform_layers: bool = False
    # Every head of a layer keeps equally many. Changes nothing where the method does so itself.
    uniform_heads: bool = False
    # Share of the layer's mean that every head keeps at least. None: the method's own.
    head_floor: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    # What a ragged method decodes by on a GPU; flashinfer runs without a CUDA graph of decode.
    decode_kernel: DecodeKernel = "triton"

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHOD_CHOICES:
            raise ValueError("unknown method")
        return method

    @field_validator("pool_width")
    @classmethod
    def _odd_pool_width(cls, pool_width: int) -> int:
        if pool_width % 2 == 0:
            raise ValueError("even")
        return pool_width

    @field_validator("head_floor")
    @classmethod
    def _heads_compete(cls, head_floor: float | None, info: ValidationInfo) -> float | None:
        # What is absent is bad itself.
        method = info.data.get("method", "none")
        if head_floor is not None and method not in ("none", *POOLED_HEAD_METHODS):
            raise ValueError(f"{method} gives every head of a layer the same")
        if head_floor is not None and info.data.get("uniform_heads", False):
            raise ValueError("uniform_heads=True gives every head of a layer the same")
        return head_floor

    @field_validator("budget")
    @classmethod
    def _fractions_or_tokens(
        cls, budget: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        window_size = info.data.get("window_size", 0)  # absent if it is bad itself
        for rung in budget:
            if not math.isfinite(rung) or rung <= 0 or (rung > 1 and rung != int(rung)):
                raise ValueError(f"{_plain(rung)} is neither a fraction nor a number of tokens")
            if 1 < rung <= window_size:
                raise ValueError(f"must exceed window_size={window_size}, it includes the window")
        for above, below in itertools.pairwise(budget):
            if below >= above or (above > 1) != (below > 1):
                raise ValueError(f"{_plain(below)} is not a lower rung than {_plain(above)}")
        if len(budget) > 1 and info.data.get("method") == "streamingllm":
            raise ValueError("streamingllm takes one budget, two bytes cannot hold its order")
        return budget

    @field_validator("decode_interval")
    @classmethod
    def _above_window(cls, interval: int | None, info: ValidationInfo) -> int | None:
        window_size = info.data.get("window_size", 0)
        if interval is not None and interval <= window_size:
            raise ValueError(f"must exceed window_size={window_size}")
        if interval is not None and info.data.get("method") in ("streamingllm", "random"):
            raise ValueError(f"{info.data['method']} scores by no queries")
        return interval

    @property
    def enabled(self) -> bool:
        return self.method != "none"

    @property
    def ragged(self) -> bool:
        return self.method in RAGGED_METHODS

    @property
    def has_ladder(self) -> bool:
        return len(self.budget) > 1

    def rungs(self, suffix_len: int, page_size: int) -> tuple[int, ...]:
        """Slots that a suffix of `suffix_len` tokens may be compressed to, the most first.

        Multiples of `page_size`, at least window_size + 1 each, so that the window and one scored
        entry fit; only those that drop something, so none where the budget covers the suffix.
        """
        rungs: list[int] = []
        for budget in self.budget:
            tokens = math.ceil(budget * suffix_len) if budget <= 1 else int(budget)
            tokens = max(tokens, self.window_size + 1)
            slots = -(-tokens // page_size) * page_size
            if slots < min(rungs[-1:] or [suffix_len]):
                rungs.append(slots)
        return tuple(rungs)

    def covers(self, suffix_len: int) -> bool:
        """Whether the first rung drops nothing: the suffix stays exact until slots are short."""
        first = self.budget[0]
        return first == 1 or first >= suffix_len

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], display: Callable[[str], str] = str
    ) -> KVCompressionConfig:
        """Validate `values`; raises KVCompressionError with a sentence for every bad one.

        `display` turns a field's name into what its user typed.
        """
        return _validate(cls, values, display)

    def for_request(self, override: Any) -> KVCompressionConfig:
        """The settings of one request: `custom_params["kv_compression"]` laid over the server's.

        The server's head_floor stays behind where the request's method has no use for it.
        Raises KVCompressionError naming field, value and range.
        """
        if not isinstance(override, Mapping):
            raise KVCompressionError(
                [
                    f"kv_compression={override!r}: accepts an object with any of "
                    f"{', '.join(RequestOverride.model_fields)}"
                ]
            )
        request = _validate(RequestOverride, override, "kv_compression.{}".format)
        if request.method in RAGGED_METHODS and not self.ragged:
            served = ", ".join(UNIFORM_METHODS)
            raise KVCompressionError(
                [
                    f"kv_compression.method={request.method!r}: accepts one of {served} on this "
                    f"server, which runs {self.method} on a decode backend for equal budgets"
                ]
            )
        if request.budget is not None and len(request.budget) > 1 and not self.has_ladder:
            raise KVCompressionError(
                [
                    f"kv_compression.budget={_typed(request.budget)}: accepts one budget on this "
                    "server, which was not started with a ladder and keeps no scores"
                ]
            )
        changed = request.model_dump(exclude_unset=True, exclude={"enabled"})
        merged = {**self.model_dump(), **changed}
        if merged["method"] not in POOLED_HEAD_METHODS:
            merged["head_floor"] = None
        settings: KVCompressionConfig = _validate(type(self), merged, "kv_compression.{}".format)
        return settings if request.enabled else settings.model_copy(update={"method": "none"})


class RequestOverride(BaseModel):
    """The keys a request may send in `custom_params["kv_compression"]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    enabled: bool = True
    method: Literal[METHOD_CHOICES[1:]] | None = None  # type: ignore[valid-type]
    budget: Ladder | None = None


def _validate(model: type, values: Mapping[str, Any], display: Callable[[str], str]) -> Any:
    try:
        return model(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        reasons = [_sentence(e, display, model) for e in error.errors()]
        raise KVCompressionError(reasons) from None


def _sentence(error: Any, display: Callable[[str], str], model: Any) -> str:
    inner = error.get("ctx", {}).get("error")
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return f"{display(field)}={error['input']!r}: unknown field, accepts {known}"
    why = f" ({inner})" if isinstance(inner, ValueError) else ""
    return f"{display(field)}={_typed(error['input'])}: accepts {_ACCEPTS[field]}{why}"


def _typed(value: Any) -> str:
    """As its user typed it: a ladder with commas, a whole number without a point."""
    if isinstance(value, tuple):
        return ",".join(repr(_plain(rung)) for rung in value)
    return repr(_plain(value))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
