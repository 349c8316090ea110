# SPDX-License-Identifier: Apache-2.0
"""What is compared: a server's options, its plugins, and what each request asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.methods import METHOD_CHOICES
from lava_sglang.tools.client import OFF

STOCK = "stock"
NAMES = {
    STOCK: "SGLang without the plugin (without a GPU: with its CPU platform only)",
    "none": "the plugin with --kv-compression none",
    "below-threshold": "compression on, every prompt shorter than its threshold",
    "off": "compression on, switched off by every request: our decode backend, nothing compressed",
}
ONLY_PLATFORM = (("SGLANG_PLUGINS", "lava_cpu"),)
"""Names the one plugin to load. On a GPU it does nothing; SGLang needs it to run on a CPU."""

NO_PROMPT_IS_SO_LONG = 10**9


@dataclass(frozen=True)
class ServerKind:
    """A server's own options, beside those that all servers of a comparison get."""

    options: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Target:
    """One column of a comparison."""

    name: str
    server: ServerKind
    custom_params: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def parse(cls, name: str, method: str, min_tokens: int | None = None) -> Target:
        """name: one of NAMES, or METHOD@BUDGET, or METHOD@BUDGET:KEY=VALUE with further settings
        and more of them after more colons. A BUDGET with a comma is a ladder. method: of `off` and
        `below-threshold`. Raises KVCompressionError."""
        threshold = () if min_tokens is None else (MIN_TOKENS, str(min_tokens))
        if name == STOCK:
            return cls(name, ServerKind((), ONLY_PLATFORM))
        if name == "none":
            return cls(name, ServerKind((METHOD, "none")))
        if name == "off":
            return cls(name, ServerKind((METHOD, method, *threshold)), {"kv_compression": OFF})
        if name == "below-threshold":
            return cls(name, ServerKind((METHOD, method, MIN_TOKENS, str(NO_PROMPT_IS_SO_LONG))))
        parts, *pairs = name.split(":")
        own_method, at, budget = parts.partition("@")
        if not at or own_method not in METHOD_CHOICES[1:]:
            raise KVCompressionError(
                [
                    f"--compare {name}: accepts {', '.join(NAMES)}, or METHOD@BUDGET with METHOD "
                    f"one of {', '.join(METHOD_CHOICES[1:])}"
                ]
            )
        settings = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        rungs = [_value(rung) for rung in budget.split(",")]
        values = {
            "method": own_method,
            **settings,
            "budget": tuple(rungs) if rungs[1:] else rungs[0],
        }
        KVCompressionConfig.parse(values, f"--compare {name}: {{}}".format)
        options = [METHOD, own_method, *threshold]
        if settings:
            options += [SETTINGS, json.dumps(settings)]
        if rungs[1:]:  # the ladder is a setting of the server
            return cls(name, ServerKind((*options, BUDGET, budget)))
        request = {"kv_compression": {"budget": rungs[0]}}
        return cls(name, ServerKind(tuple(options)), request)


METHOD = "--kv-compression"
BUDGET = "--kv-compression-budget"
MIN_TOKENS = "--kv-compression-min-tokens"
SETTINGS = "--kv-compression-config"


def _value(text: str) -> Any:
    """As in JSON; the text itself where it is none: the settings say what they accept."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def in_turn(targets: list[Target], repeats: int) -> list[list[tuple[int, Target]]]:
    """Repeat and target in the order of the run, one list for each start of a server.

    Targets of one server follow each other; every second repeat goes backwards (A B B A A B), so
    that a slow change of the machine falls on all alike and a server is started once a repeat.
    """
    servers = list(dict.fromkeys(target.server for target in targets))
    grouped = sorted(targets, key=lambda target: servers.index(target.server))
    starts: list[list[tuple[int, Target]]] = []
    last: ServerKind | None = None
    for repeat in range(repeats):
        for target in grouped if repeat % 2 == 0 else reversed(grouped):
            if target.server != last:
                starts.append([])
                last = target.server
            starts[-1].append((repeat, target))
    return starts
