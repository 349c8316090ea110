# SPDX-License-Identifier: Apache-2.0
"""The server arguments: SGLang's own record with the four `--kv-compression*` fields.

SGLang assembles `ServerArgs` when its module is imported, before plugins load, so a field can
only be added by a subclass put in its place (`plugin.py`). Every process unpickles this class,
which imports this module: keep it light.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from sglang.srt.arg_groups.arg_utils import NS, A, Arg
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.server_args import ServerArgs

from lava_sglang.config import (
    DECODE_BACKENDS,
    KVCompressionConfig,
    KVCompressionError,
    parse_budget,
)
from lava_sglang.methods import COMPETING_METHODS, METHOD_CHOICES, METHODS, RAGGED_METHODS

logger = logging.getLogger(__name__)

_DEFAULTS = KVCompressionConfig()
_METHODS_HELP = "; ".join(f"{name}: {traits.help}" for name, traits in METHODS.items())
_HEAD_FLOOR_METHODS = ", ".join(COMPETING_METHODS)


def parse_config(text: str) -> Any:
    """The option's JSON; its own error is about a function of Python's."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: accepts a JSON object ({error})") from None


class LavaServerArgs(ServerArgs, dict=True):  # type: ignore[call-arg]
    """SGLang's `ServerArgs` (srt/server_args.py) plus the settings of KV compression."""

    kv_compression: A[
        str,
        Arg(
            help="Compress the KV cache of each request's unshared prompt suffix with this method. "
            f"{_METHODS_HELP}.",
            choices=list(METHOD_CHOICES),
        ),
        NS("memory"),
    ] = _DEFAULTS.method
    kv_compression_budget: A[
        Any,
        Arg(
            help="KV entries kept of the suffix, a mean per layer and KV head: a fraction up to 1, "
            "or a number of tokens (the observation window included). Several, such as "
            "0.5,0.25,0.125, are a ladder: the first that the pool affords, lower when slots are "
            "short.",
            type_parser=parse_budget,
        ),
        NS("memory"),
    ] = _DEFAULTS.ladder[0]
    kv_compression_min_tokens: A[
        int,
        Arg(help="Serve suffixes shorter than this many tokens uncompressed."),
        NS("memory"),
    ] = _DEFAULTS.min_tokens
    kv_compression_config: A[
        dict[str, Any] | None,
        Arg(
            help="Further settings as JSON: window_size, pool_width, sink_tokens, scope, trigger, "
            "decode_interval, admit_ahead, seed, decode_kernel, "
            "uniform_layers (true: every layer keeps equally many), uniform_heads (true: every "
            "head of a layer does), head_floor (share of the layer's mean, 0 to 1, that every head "
            f"keeps at least; {_HEAD_FLOOR_METHODS}). "
            'Example: \'{"window_size": 32, "scope": "prompt"}\'',
            type_parser=parse_config,
        ),
        NS("memory"),
    ] = None

    def __reduce__(self) -> tuple[Any, ...]:
        _, (cls, fields, bookkeeping) = super().__reduce__()
        return _rebuild, (cls, fields, bookkeeping)


def _rebuild(cls: type, fields: dict[str, Any], bookkeeping: dict[str, Any]) -> LavaServerArgs:
    """Unpickle in a child process, and install the plugin there or fail.

    SGLang's own loader would log a broken plugin and serve without it.
    """
    from sglang.srt.server_args import _rebuild_server_args

    server_args: LavaServerArgs = _rebuild_server_args(cls, fields, bookkeeping)
    if server_args.kv_compression != "none":
        from lava_sglang.integration import plugin

        plugin.install()
    return server_args


_OPTIONS = {
    "method": "kv_compression",
    "budget": "kv_compression_budget",
    "min_tokens": "kv_compression_min_tokens",
}
"""Setting -> the field of the server arguments that holds it; the rest are in the JSON."""


def config_of(server_args: ServerArgs) -> KVCompressionConfig:
    """The validated settings in `server_args`; raises KVCompressionError with all bad values."""
    further = server_args.kv_compression_config
    if further is None:
        further = {}
    if not isinstance(further, dict):
        raise KVCompressionError([f"--kv-compression-config={further!r}: accepts a JSON object"])
    reasons = [
        f"--kv-compression-config {name}={further[name]!r}: set {_display(name)} instead"
        for name in _OPTIONS
        if name in further
    ]
    values = {**further, **{name: getattr(server_args, arg) for name, arg in _OPTIONS.items()}}
    try:
        config = KVCompressionConfig.parse(
            values,
            _display,
            offered=[name for name in KVCompressionConfig.model_fields if name not in _OPTIONS],
        )
    except KVCompressionError as error:
        raise KVCompressionError(error.reasons + reasons) from None
    if reasons:
        raise KVCompressionError(reasons)
    return config


def _display(setting: str) -> str:
    if setting in _OPTIONS:
        return "--" + _OPTIONS[setting].replace("_", "-")
    return f"--kv-compression-config {setting}"


def validate(server_args: ServerArgs, previous: Any) -> None:
    """Resolution hook (arg_groups/resolution_hooks.py, step `handle_other_validations`).

    Raises KVCompressionError with every bad setting, every SGLang feature that is switched on
    and not supported, and every version that does not fit.
    """
    previous(server_args)
    view = resolving_view(server_args)
    reasons: list[str] = []
    config = None
    try:
        config = config_of(view)
    except KVCompressionError as error:
        reasons = error.reasons
    if config is not None and not config.enabled:
        _warn_of_idle_options(config)
    if config is None or config.enabled:
        from lava_sglang.integration import refusals

        reasons = reasons + refusals.version_reasons() + refusals.feature_reasons(view)
        if config is not None and config.decode_kernel == "flashinfer":
            reasons += refusals.flashinfer_reasons(config, view.device)
    if reasons:
        raise KVCompressionError(reasons, heading="KV compression cannot start")


def _warn_of_idle_options(config: KVCompressionConfig) -> None:
    idle = [_display(name) for name, value in config if value != getattr(_DEFAULTS, name)]
    if idle:
        logger.warning("Of no effect without --kv-compression METHOD: %s", ", ".join(idle))


def choose_decode_backend(server_args: ServerArgs, previous: Any) -> None:
    """Resolution hook, step `handle_attention_backend_compatibility`.

    A method that keeps its own number of entries per head decodes on our backend; prefill stays on
    the one that the user chose or SGLang resolved. On a CPU our backend has the stock one's name.
    """
    previous(server_args)
    view = resolving_view(server_args)
    if view.kv_compression not in RAGGED_METHODS or view.device == "cpu":
        return
    try:
        kernel = config_of(view).decode_kernel
    except KVCompressionError:
        return  # `validate` tells
    declare_resolution(server_args, "lava_sglang", decode_attention_backend=DECODE_BACKENDS[kernel])
    if kernel == "flashinfer":
        _disable_decode_graph(server_args, view)


def _disable_decode_graph(server_args: ServerArgs, view: Any) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    if view.cuda_graph_config.decode.backend == Backend.DISABLED:
        return
    logger.warning(
        "The CUDA graph of decode is disabled because decode_kernel='flashinfer' plans on the host"
    )
    disabled = with_phase(view.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED)
    declare_resolution(server_args, "lava_sglang", cuda_graph_config=disabled)
