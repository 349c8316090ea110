# SPDX-License-Identifier: Apache-2.0
"""The frozen settings of KV compression, and the errors a bad value gets.

A setting has one home: `method`, `budget` and `min_tokens` are command-line options of their
own, the rest are keys of `--kv-compression-config`. A request may override `enabled`, `method`
and `budget` in `custom_params["kv_compression"]`.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from lava_sglang.methods import (
    COMPETING_METHODS,
    METHOD_CHOICES,
    METHODS,
    RAGGED_METHODS,
    UNIFORM_METHODS,
    MethodTraits,
)

if TYPE_CHECKING:
    from lava_sglang.layer_map import LayerMap

MAX_STEPS = 32
"""Of a ladder: what a client sends has a length that a scheduler may walk over."""

DECODE_BACKENDS = {"triton": "lava", "flashinfer": "lava_flashinfer"}
"""Decode kernel -> name of our attention backend: only these decode ragged requests on a GPU."""

Scope = Literal["suffix", "prompt", "auto"]
Trigger = Literal["always", "pressure"]
DecodeKernel = Literal["triton", "flashinfer"]

REQUEST_KEY = "kv_compression"
"""Where a request's settings are in its `custom_params`."""

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
    f"{', '.join(COMPETING_METHODS)} and without uniform_heads",
    "decode_kernel": "'triton' or 'flashinfer'",
    "enabled": "true or false",
}


def parse_budget(text: str) -> Any:
    """A budget as it is typed, `0.25` or `0.5,0.25`, as a number or a list of them; the text itself
    if it is neither, for its error."""
    try:
        steps = [float(step) for step in text.split(",")]
    except ValueError:
        return text
    return steps if len(steps) > 1 else steps[0]


def budget_text(budget: Iterable[float]) -> str:
    """A ladder as it is typed: `0.5,0.25`."""
    return ",".join(repr(_plain(step)) for step in budget)


def _ladder(budget: Any) -> Any:
    """One number or a list of them as a tuple of floats; anything else as it is."""
    parsed = parse_budget(budget) if isinstance(budget, str) and "," in budget else budget
    steps = parsed if isinstance(parsed, list | tuple) else [parsed]
    if not 0 < len(steps) <= MAX_STEPS:
        return budget
    if any(isinstance(step, bool) or not isinstance(step, int | float) for step in steps):
        return budget
    try:
        return tuple(float(step) for step in steps)
    except OverflowError:  # an integer above 1.8e308
        return budget


def _falls_on_one_scale(budget: tuple[float, ...]) -> tuple[float, ...]:
    for step in budget:
        if not math.isfinite(step) or step <= 0 or (step > 1 and step != int(step)):
            raise ValueError(f"{_plain(step)} is neither a fraction nor a number of tokens")
    for above, below in itertools.pairwise(budget):
        if below >= above or (above > 1) != (below > 1):
            raise ValueError(f"{_plain(below)} is not a lower rung than {_plain(above)}")
    return budget


Ladder = Annotated[tuple[float, ...], BeforeValidator(_ladder), AfterValidator(_falls_on_one_scale)]
"""Fractions of the suffix, or tokens, the most first; one number is a ladder of one step."""


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
    # What the operator calls the budget, `ladder` in the code: fractions of the suffix up to 1,
    # tokens above it, of the mean entries kept per layer and KV head. A request takes the first
    # step that the pool affords, and goes down when slots are short.
    budget: Ladder = (0.25,)
    # Width in tokens of the max-pool over the window's attention, in the methods that pool it.
    pool_width: int = Field(default=7, ge=1, le=63)
    # First suffix tokens that StreamingLLM keeps.
    sink_tokens: int = Field(default=4, ge=0)
    # suffix: a prefix matched in the radix tree stays exact and shared. prompt: all is compressed.
    # auto: a prefix stays exact if others use it.
    scope: Scope = "auto"
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
        if method != "none" and method not in METHODS:
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
        traits = _traits(info)
        if head_floor is not None and traits is not None and not traits.heads_compete:
            raise ValueError(f"{info.data['method']} gives every head of a layer the same")
        if head_floor is not None and info.data.get("uniform_heads", False):
            raise ValueError("uniform_heads=True gives every head of a layer the same")
        return head_floor

    @field_validator("budget")
    @classmethod
    def _suits_window_and_method(
        cls, budget: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        window_size = info.data.get("window_size", 0)  # 0 if it is refused itself
        if any(1 < step <= window_size for step in budget):
            raise ValueError(f"must exceed window_size={window_size}, it includes the window")
        traits = _traits(info)
        if len(budget) > 1 and traits is not None and not traits.takes_ladder:
            method = info.data["method"]
            raise ValueError(f"{method} takes one budget, two bytes cannot hold its order")
        return budget

    @field_validator("decode_interval")
    @classmethod
    def _above_window(cls, interval: int | None, info: ValidationInfo) -> int | None:
        window_size = info.data.get("window_size", 0)  # 0 if it is refused itself
        if interval is not None and interval <= window_size:
            raise ValueError(f"must exceed window_size={window_size}")
        traits = _traits(info)
        if interval is not None and traits is not None and not traits.needs_queries:
            raise ValueError(f"{info.data['method']} scores by no queries")
        return interval

    @property
    def enabled(self) -> bool:
        return self.method != "none"

    @property
    def ragged(self) -> bool:
        return self.enabled and METHODS[self.method].ragged

    @property
    def ladder(self) -> tuple[float, ...]:
        """What the operator asks for, fractions or tokens; `rungs` are the slots of one suffix."""
        return self.budget

    @property
    def has_ladder(self) -> bool:
        return len(self.ladder) > 1

    def rungs(
        self, suffix_len: int, page_size: int, layers: LayerMap | None = None
    ) -> tuple[int, ...]:
        """The ladder in slots: what `suffix_len` tokens may be compressed to, the most first.

        Multiples of `page_size`, at least window_size + 1 each, so that the window and one scored
        entry fit; layers: of the model, whose sliding ones keep what they read and no more. None:
        none slides. A step that would drop nothing has no rung, nor has one that comes to the slots
        of the step above it, nor any of a suffix that a sliding layer sees past.
        """
        fewest, most = self.window_size + 1, suffix_len
        if layers is not None:
            if suffix_len < layers.sliding_window - 1:
                return ()
            fewest = layers.fewest_slots(self.window_size, self.ragged)
            most = layers.most_slots(suffix_len, self.window_size, self.ragged)
        rungs: list[int] = []
        for step in self.ladder:
            tokens = math.ceil(step * suffix_len) if step <= 1 else int(step)
            tokens = max(fewest, min(tokens, most)) if tokens < suffix_len else suffix_len
            slots = -(-tokens // page_size) * page_size
            if slots < min(rungs[-1:] or [suffix_len]):
                rungs.append(slots)
        return tuple(rungs)

    def covers(self, suffix_len: int) -> bool:
        """Whether the ladder's first step drops nothing: the suffix stays exact until slots are
        short."""
        first = self.ladder[0]
        return first == 1 or first >= suffix_len

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        display: Callable[[str], str] = str,
        offered: Iterable[str] | None = None,
    ) -> KVCompressionConfig:
        """Validate `values`; raises KVCompressionError with a sentence for every bad one.

        `display` turns a field's name into what its user typed. offered: the fields that the answer
        to an unknown one lists, all of them if None.
        """
        return _validate(cls, values, display, offered)

    def for_custom_params(self, custom_params: Any) -> KVCompressionConfig:
        """The settings of a request that was sent with these `custom_params`.

        A client may send any JSON there, and SGLang reads objects only: anything else holds no
        settings. Raises KVCompressionError naming field, value and range.
        """
        override = custom_params.get(REQUEST_KEY) if isinstance(custom_params, Mapping) else None
        return self if override is None else self.for_request(override)

    def for_request(self, override: Any) -> KVCompressionConfig:
        """The settings of one request: `custom_params["kv_compression"]` laid over the server's.

        The server's head_floor and decode_interval stay behind where the request's method has no
        use for them. Raises KVCompressionError naming field, value and range, of fields that the
        request sent and no others.
        """
        if not isinstance(override, Mapping):
            fields = ", ".join(RequestOverride.model_fields)
            raise KVCompressionError(
                [f"{REQUEST_KEY}={_typed(override)}: accepts an object with any of {fields}"]
            )
        request = _validate(RequestOverride, override, _display)
        if not request.enabled:
            return self.model_copy(update={"method": "none"})
        reason = self._not_served(request)
        if reason is not None:
            raise KVCompressionError([reason])
        merged = {
            **self.model_dump(),
            **request.model_dump(exclude_unset=True, exclude={"enabled"}),
        }
        traits = METHODS.get(merged["method"])
        if traits is None or not traits.heads_compete:
            merged["head_floor"] = None
        if traits is None or not traits.needs_queries:
            merged["decode_interval"] = None
        settings: KVCompressionConfig = _validate(type(self), merged, _display)
        return settings

    def _not_served(self, request: RequestOverride) -> str | None:
        """What this server was not started for."""
        method = f"{_display('method')}={request.method!r}"
        if request.method in RAGGED_METHODS and not self.ragged:
            served = ", ".join(UNIFORM_METHODS)
            return (
                f"{method}: accepts one of {served} on this "
                f"server, which runs {self.method} on a decode backend for equal budgets"
            )
        takes_ladder = request.method is None or METHODS[request.method].takes_ladder
        if request.budget is None and self.has_ladder and not takes_ladder:
            return (
                f"{method}: accepts it with one {_display('budget')} on this server, whose ladder "
                f"{budget_text(self.ladder)} it cannot go down"
            )
        if request.budget is not None and len(request.budget) > 1 and not self.has_ladder:
            return (
                f"{_display('budget')}={_typed(request.budget)}: accepts one budget on this "
                "server, which was not started with a ladder and keeps no scores"
            )
        return None


class RequestOverride(BaseModel):
    """The keys a request may send in `custom_params["kv_compression"]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    enabled: bool = True
    method: Literal[METHOD_CHOICES[1:]] | None = None  # type: ignore[valid-type]
    budget: Ladder | None = None


def _traits(info: ValidationInfo) -> MethodTraits | None:
    """The traits of the method that is validated before; None where it is off, or refused itself.

    pydantic leaves a setting that it refuses out of `info.data`.
    """
    return METHODS.get(info.data.get("method", "none"))


def _display(field: str) -> str:
    return f"{REQUEST_KEY}.{field}"


def _validate(
    model: type[BaseModel],
    values: Mapping[str, Any],
    display: Callable[[str], str],
    offered: Iterable[str] | None = None,
) -> Any:
    known = {name: value for name, value in values.items() if name in model.model_fields}
    unknown = [name for name in values if name not in known]
    reasons = []
    if unknown:  # named one by one, as long as that can be read
        fields = ", ".join(model.model_fields if offered is None else offered)
        shown = [f"{display(_name(name))}={_typed(values[name])}" for name in unknown[:_MAX_NAMED]]
        reasons = [f"{name}: unknown field, accepts {fields}" for name in shown]
        if len(unknown) > len(shown):
            reasons.append(f"{len(unknown) - len(shown)} more unknown fields")
    try:
        found = model(**known)
    except ValidationError as error:
        raise KVCompressionError(
            [_sentence(e, display) for e in error.errors()] + reasons
        ) from None
    if reasons:
        raise KVCompressionError(reasons)
    return found


def _sentence(error: Any, display: Callable[[str], str]) -> str:
    inner = error.get("ctx", {}).get("error")
    field = str(error["loc"][0])
    why = f" ({inner})" if isinstance(inner, ValueError) else ""
    return f"{display(field)}={_typed(error['input'])}: accepts {_ACCEPTS[field]}{why}"


_MAX_NAMED = 8
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def _typed(value: Any) -> str:
    """As its user typed it: a ladder with commas, a whole number without a point.

    Short and in ASCII, whatever a client sent: it goes into logs and messages.
    """
    parts = value if isinstance(value, tuple) and 0 < len(value) <= MAX_STEPS else (value,)
    try:
        text = ",".join(_SHORT.repr(_plain(part)) for part in parts)
        return text.encode("ascii", "backslashreplace").decode()
    except Exception:  # an integer of more digits than Python prints, an object that has no repr
        return f"<{type(value).__name__}>"


def _name(key: Any) -> str:
    """An unknown field as it was sent; quoted if it is no plain word."""
    plain = isinstance(key, str) and key.isascii() and key.replace("-", "_").isidentifier()
    return key if plain and len(key) <= _SHORT.maxstring else _typed(key)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
