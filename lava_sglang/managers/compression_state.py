# SPDX-License-Identifier: Apache-2.0
"""The states of a request's compression, and which may follow which.

    Pending ──► Planned ──► Compressed ──► Compressed   a rung lower, or with its answer
       │           │  │         ▲
       │           │  └──► ExactForNow                  exact until slots are short
       ▼           ▼
    Skipped     Skipped                                 with a reason

A retraction leads from any of them back to Pending. Only `LavaReq` goes from one to another.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from lava_sglang.attention.window import WindowQueries


class SkipReason(StrEnum):
    """Why a request is served uncompressed. Always legal; counted by reason."""

    DISABLED = "disabled"  # the request asked for it
    TOO_SHORT = "too_short"  # suffix below min_tokens
    PARALLEL_SAMPLES = "parallel_samples"  # n > 1: SGLang caches the prompt before its samples run
    BUDGET_COVERS_SUFFIX = "budget_covers_suffix"  # nothing would be dropped
    NO_DECODE = "no_decode"  # at most one output token: no later step would read less
    NO_ROOM = "no_room"  # no b free slots for the copy
    NO_QUERIES = "no_queries"  # the attention backend handed over no window queries
    ABORTED = "aborted"  # ended before its prefill did
    SESSION = "session"  # a turn of a session: its entries are the next turn's
    UNSUPPORTED_REQUEST = "unsupported_request"  # beam search, embeddings, captures


NO_PRESSURE = "no_pressure"
"""The reason that a response and the totals give for `ExactForNow`."""


class CompressionPlan(NamedTuple):
    """What compressing one prompt does, known on the host before it is prefilled."""

    prompt_len: int  # I = P + N, tokens
    shared_prefix_len: int  # P, tokens
    rungs: tuple[int, ...]  # slots that its tape may take, b, the most first
    exact_first: bool = False  # whether it stays exact until slots are short

    @property
    def suffix_len(self) -> int:
        """N, tokens."""
        return self.prompt_len - self.shared_prefix_len


class Pending(NamedTuple):
    """Its prefill has not been launched."""


class Planned(NamedTuple):
    """It is being prefilled, and compressed when that ends."""

    plan: CompressionPlan
    window: WindowQueries | None  # None if its method needs no queries


class ExactForNow(NamedTuple):
    """It decodes exactly. A first copy is made when slots are short, by the queries it holds."""

    plan: CompressionPlan
    window: WindowQueries | None


class Compressed(NamedTuple):
    """Its row holds a tape."""

    plan: CompressionPlan
    budget: int  # b, slots of the tape
    answer_compressed: int = 0  # tokens of the answer that went onto the tape or were dropped


class Skipped(NamedTuple):
    """It stays exact."""

    reason: SkipReason


CompressionState = Pending | Planned | ExactForNow | Compressed | Skipped

FOLLOWERS: dict[type, tuple[type, ...]] = {
    Pending: (Planned, Skipped),
    Planned: (ExactForNow, Compressed, Skipped),
    ExactForNow: (Compressed,),
    Compressed: (Compressed,),
    Skipped: (),
}
"""What each state may become; a retraction makes any of them Pending."""


class IllegalTransition(RuntimeError):
    """A fault of ours: no request, whatever it asks for, leads to one."""
