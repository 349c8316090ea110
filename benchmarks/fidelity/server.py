# SPDX-License-Identifier: Apache-2.0
"""What a running server of lava-sglang makes of a prompt: its answer, or its log-probabilities.

The server tells those of some tokens along a reply that is forced on it, by `ForcedTokens`, a logit
processor of ours. SGLang's own log-probabilities would not do: those of input tokens come from the
exact prefill, and a grammar masks the logits before they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.fidelity.results import Record
from lava_sglang.tools.client import OFF, ServerClient
from lava_sglang.tools.forced_tokens import SHIFT, ForcedTokens

REST_FLOOR = 1e-5
"""Probability of all other tokens together, at least: float32 holds it no better next to 1."""


def settings_of(method: str, budget: float | None) -> dict[str, Any]:
    """What a request asks for; the whole prompt where there is no budget."""
    return dict(OFF) if budget is None else {"method": method, "budget": budget}


def check_scope(server: ServerClient, needed: str) -> None:
    """Raises ValueError unless the server compresses `needed`."""
    if server.scope() != needed:
        raise ValueError(
            f"the server's scope={server.scope()!r}: needs {needed!r}, else a prompt that was "
            "sent before is found in the radix tree and stays exact. Start it with "
            f'--kv-compression-config \'{{"scope": "{needed}"}}\''
        )


class Reply(NamedTuple):
    text: str
    output_ids: list[int]
    cached_tokens: int  # of the prompt, found in the radix tree
    compressed: bool
    kept_tokens: int  # slots of the suffix after compression; the prompt's length without it
    reason: str  # why it was not compressed, or empty


def ask(
    server: ServerClient,
    prompt: Sequence[int],
    max_new_tokens: int,
    kv_compression: Mapping[str, Any],
) -> Reply:
    """A greedy answer."""
    answer = server.generate(prompt, max_new_tokens, kv_compression)
    info = answer["meta_info"]["kv_compression"]
    return Reply(
        text=answer["text"],
        output_ids=answer["output_ids"],
        cached_tokens=answer["meta_info"]["cached_tokens"],
        compressed=info["status"] == "compressed",
        kept_tokens=info.get("kept_tokens", len(prompt)),
        reason=info.get("reason", ""),
    )


class ForcedReply(NamedTuple):
    """T tokens after the first, each after the true ones before it; k tokens watched at each."""

    watched: list[list[float]]  # log-probabilities [T, k]
    most_likely: list[float]  # log-probability [T] of the most likely token
    compressed: bool
    kept_tokens: int
    reason: str


def likely_tokens(
    server: ServerClient, prompt: Sequence[int], continuation: Sequence[int], count: int
) -> list[list[int]]:
    """The `count` most likely tokens at each of the continuation's but the first, the most likely
    first, each after the true ones before it: from an exact prefill of both."""
    answer = server.generate(
        [*prompt, *continuation],
        1,
        OFF,
        return_logprob=True,
        logprob_start_len=len(prompt),
        top_logprobs_num=count,
    )
    found = answer["meta_info"]["input_top_logprobs"][1 - len(continuation) :]
    return [[token for _, token, _ in tokens] for tokens in found]


def force(
    server: ServerClient,
    prompt: Sequence[int],
    tokens: Sequence[int],
    watched: Sequence[Sequence[int]],
    kv_compression: Mapping[str, Any],
) -> ForcedReply:
    """The server replies `tokens`, and tells log-probabilities on the way.

    watched: k token ids for each of `tokens` but the first. The server needs
    --enable-custom-logit-processor. Raises RuntimeError if it replied anything else.
    """
    free = set(range(len(watched[0]) + 1 + len(tokens))) - set(tokens)
    columns = sorted(free)[: len(watched[0]) + 1]
    params = {
        "kv_compression": dict(kv_compression),
        "forced_tokens": list(tokens),
        # The first token comes from the exact prompt: what is told there is not read.
        "watched_tokens": [token for row in [watched[0], *watched] for token in row],
        "watched_columns": columns,
    }
    answer = server.generate(
        prompt,
        len(tokens),
        sampling={"ignore_eos": True, "custom_params": params},
        custom_logit_processor=ForcedTokens.to_str(),
        return_logprob=True,
        token_ids_logprob=columns,
    )
    if answer["output_ids"] != list(tokens):
        raise RuntimeError(f"the server replied {answer['output_ids']}, forced was {tokens}")
    info = answer["meta_info"]["kv_compression"]
    steps = answer["meta_info"]["output_token_ids_logprobs"][1:]
    told = [{token: value + SHIFT for value, token, _ in step} for step in steps]
    return ForcedReply(
        watched=[[step[column] for column in columns[:-1]] for step in told],
        most_likely=[step[columns[-1]] for step in told],
        compressed=info["status"] == "compressed",
        kept_tokens=info.get("kept_tokens", len(prompt)),
        reason=info.get("reason", ""),
    )


def compare(expected: ForcedReply, found: ForcedReply) -> Record:
    """What `divergence.compare` returns, from the log-probabilities [T, k] of a server.

    Both replies watch the same tokens, the first of each step the one that came. kl counts the
    tokens that are not watched as one: it is below the KL of the whole vocabulary or equal.
    """
    steps = list(zip(expected.watched, found.watched, strict=True))
    best = [row.index(max(row)) for row in expected.watched]
    tokens = zip(best, found.watched, found.most_likely, strict=True)
    return {
        "kl": _mean([_kl(row, other) for row, other in steps]),
        # The same float32 number, shifted: equal if it is the same token.
        "top1": _mean([float(row[index] >= most) for index, row, most in tokens]),
        "nll_change": _mean([row[0] - other[0] for row, other in steps]),
    }


def _kl(expected: Sequence[float], found: Sequence[float]) -> float:
    """KL over the watched tokens and the rest as one class, log-probabilities in nats."""
    known = sum(math.exp(p) * (p - q) for p, q in zip(expected, found, strict=True))
    rest, other = _rest(expected), _rest(found)
    return known + rest * math.log(rest / other)


def _rest(row: Sequence[float]) -> float:
    return max(1 - sum(math.exp(value) for value in row), REST_FLOOR)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
