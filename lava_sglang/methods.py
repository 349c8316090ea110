# SPDX-License-Identifier: Apache-2.0
"""The table of methods. A method is named here and nowhere else.

The choices and the help of `--kv-compression`, what each method refuses and what its policy does
with layers and heads follow from its line. A new method is a file in `policy/` and a line here.
This module is plain data: it imports neither torch nor a method's class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodTraits:
    """What the server has to know of a method before it serves one."""

    path: str
    """Where its class is, as `module:name`. It is imported when the method is first used."""

    help: str
    """What it keeps, in a few words for `--help`."""

    layers_differ: bool = False
    """Whether layers keep different numbers of entries."""

    heads_compete: bool = False
    """Whether the heads of a layer compete for its entries. If not, they keep equally many, and
    `head_floor` is refused."""

    needs_queries: bool = True
    """Whether a score reads the queries of the observation window. If not, an answer cannot be
    scored by its own queries, and `decode_interval` is refused."""

    takes_ladder: bool = True
    """Whether the two bytes of a score that a ladder keeps hold the score's order. If not, a budget
    of several rungs is refused."""

    @property
    def ragged(self) -> bool:
        """Whether heads keep different numbers of entries, which needs our decode backend."""
        return self.layers_differ or self.heads_compete


METHODS: dict[str, MethodTraits] = {
    "lava": MethodTraits(
        "lava_sglang.policy.lava:LAVa",
        "attention times value norm, layers share by entropy and heads by score",
        layers_differ=True,
        heads_compete=True,
    ),
    "lava_span": MethodTraits(
        "lava_sglang.policy.lava_span:LAVaSpan",
        "attention times the token's value, and the words after it, heads share by score",
        heads_compete=True,
    ),
    "adakv": MethodTraits(
        "lava_sglang.policy.adakv:AdaKV",
        "attention, heads share by score",
        heads_compete=True,
    ),
    "pyramidkv": MethodTraits(
        "lava_sglang.policy.pyramidkv:PyramidKV",
        "attention, fewer entries from layer to layer",
        layers_differ=True,
    ),
    "snapkv": MethodTraits(
        "lava_sglang.policy.snapkv:SnapKV",
        "attention",
    ),
    "streamingllm": MethodTraits(
        "lava_sglang.policy.streamingllm:StreamingLLM",
        "the first tokens and the most recent",
        needs_queries=False,
        takes_ladder=False,
    ),
    "random": MethodTraits(
        "lava_sglang.policy.random:Random",
        "a seeded random choice, the baseline",
        needs_queries=False,
    ),
}

METHOD_CHOICES = ("none", *METHODS)
"""What `--kv-compression` takes."""

RAGGED_METHODS = tuple(name for name, traits in METHODS.items() if traits.ragged)
"""Methods that keep their own number of entries in every layer and head: any of them needs the
server to have been started with one, for its decode backend."""

UNIFORM_METHODS = tuple(name for name, traits in METHODS.items() if not traits.ragged)
"""Methods that keep the same number of entries everywhere: any decode backend reads them."""

COMPETING_METHODS = tuple(name for name, traits in METHODS.items() if traits.heads_compete)
"""Methods in which the heads of a layer compete for its entries: `head_floor` has a meaning."""
