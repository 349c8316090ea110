# SPDX-License-Identifier: Apache-2.0
"""The three steps every method shares: score the entries, split the budget, select the best."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.layer_split import layer_split, uniform_weights
from lava_sglang.kernels.select import Selection, select
from lava_sglang.kernels.trim import SCORE_DTYPE
from lava_sglang.kernels.window_scores import window_scores

HEAD_FLOOR_UNITS = 1_000_000
"""A head floor is read in so many parts of the mean: whole numbers are alike on every device."""


class PromptView(NamedTuple):
    """A finished prompt, as a method sees it. Shapes are per rank."""

    arena: torch.Tensor  # [num_layers, 2, slots, num_kv_heads, head_dim], keys after RoPE
    slots: torch.Tensor  # int64 [prompt_len], the slot of each token
    queries: torch.Tensor | None  # [num_layers, window queries, num_qo_heads, head_dim]
    scaling: torch.Tensor | None  # float32 [num_layers], factor on the attention logits
    shared_prefix_len: int  # P: tokens that stay exact, no entry of theirs is scored
    window_size: int  # w: last tokens, always kept, no entry of theirs is scored

    @property
    def num_layers(self) -> int:
        return self.arena.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.arena.shape[3]

    @property
    def scored_len(self) -> int:
        """Suffix tokens that compete for a place: those before the observation window."""
        return self.slots.shape[0] - self.shared_prefix_len - self.window_size


@dataclass(frozen=True)
class Method(ABC):
    """How to keep entries. One method, one dataclass, one file; it overrides what it differs in."""

    config: KVCompressionConfig

    needs_queries: ClassVar[bool] = False
    """Whether `score` reads the window's queries; if not, none are stashed."""

    uniform_heads: ClassVar[bool] = True
    """Whether every head of a layer keeps equally many; if not, the layer's best are kept."""

    head_floor: ClassVar[float] = 0.0
    """Share of the layer's mean that every head keeps, where heads are not uniform and
    `config.head_floor` is not set."""

    def window_options(self, num_queries: int, device: torch.device) -> dict[str, Any]:
        """How the window's attention becomes a score: the keywords of `window_scores`.

        For a method that needs queries. num_queries: of the window, the oldest first.
        """
        raise NotImplementedError(f"{type(self).__name__} scores by no queries")

    def score(self, prompt: PromptView) -> torch.Tensor:
        """Importance of the scored tokens, the suffix without its window.

        Returns float32 [num_layers, num_kv_heads, scored_len]; higher is kept first.
        """
        assert prompt.queries is not None and prompt.scaling is not None
        return window_scores(
            prompt.queries,
            prompt.arena,
            prompt.slots,
            prompt.shared_prefix_len,
            prompt.window_size,
            prompt.scaling,
            **self.window_options(prompt.queries.shape[1], prompt.slots.device),
        )

    def layer_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Each layer's claim on the budget, float32 [num_layers] in [0, 1]. Equal by default."""
        return uniform_weights(scores.shape[0], scores.device)


class Ranking(NamedTuple):
    """What a method makes of a prompt: all that a choice at any budget needs."""

    scores: torch.Tensor  # float32 [num_layers, num_kv_heads, scored_len]
    layer_weights: torch.Tensor  # float32 [num_layers]


def rank(method: Method, prompt: PromptView) -> Ranking:
    """Score the prompt. With a ladder in two bytes, which is what later trims have of a score."""
    scores = method.score(prompt).contiguous()
    if method.config.uniform_layers:
        weights = uniform_weights(scores.shape[0], scores.device)
    else:
        weights = method.layer_weights(scores)
    if method.config.has_ladder:
        scores = scores.to(SCORE_DTYPE).float()
    return Ranking(scores, weights)


def keep(method: Method, prompt: PromptView, budget: int) -> Selection:
    """What each head keeps of `prompt` at this budget: `rank`, then `choose`."""
    return choose(method, rank(method, prompt), prompt, budget)


def choose(method: Method, ranking: Ranking, prompt: PromptView, budget: int) -> Selection:
    """The window, and the best of L * H * (b - w) scored entries.

    The settings `uniform_layers`, `uniform_heads` and `head_floor` replace the method's own rules.
    budget: b, window included. The kept entries of all layers and heads are L * H * b exactly.
    Reads nothing back to the host on a GPU. Source: LAVa, arXiv 2509.09754; docs of each method.
    """
    scores, weights = ranking
    num_layers, num_kv_heads, scored_len = scores.shape
    counts, floor = divide(method, weights, num_kv_heads, scored_len, budget - prompt.window_size)
    kept = select(
        scores.view(len(counts), -1, scored_len),
        counts,
        budget,
        prompt.shared_prefix_len,
        prompt.window_size,
        floor,
    )
    return kept._replace(counts=kept.counts.view(num_layers, num_kv_heads))


def divide(
    method: Method, weights: torch.Tensor, num_kv_heads: int, scored_len: int, mean: int
) -> tuple[torch.Tensor, int | torch.Tensor]:
    """How many scored entries are chosen together, and how many of them each head has at least.

    weights: float32 [num_layers]. mean: scored entries kept per layer and head, b - w.
    Returns counts, int64 [num_layers], or [num_layers * num_kv_heads] where every head chooses for
    itself; and the floor, 0 or int64 [num_layers]. A smaller mean never raises a count.
    """
    if method.uniform_heads or method.config.uniform_heads:
        # Each head is a layer of its own: a layer's entries are divided by its heads exactly.
        per_head = layer_split(weights, len(weights) * mean, scored_len)
        return per_head.repeat_interleave(num_kv_heads), 0
    cap = num_kv_heads * scored_len
    counts = layer_split(weights, len(weights) * num_kv_heads * mean, cap)
    return counts, _floor(method, counts, num_kv_heads)


def _floor(method: Method, counts: torch.Tensor, num_kv_heads: int) -> int | torch.Tensor:
    """Scored entries that each head has at least, of its layer's: 0 or int64 [num_layers]."""
    given = method.config.head_floor
    units = round((method.head_floor if given is None else given) * HEAD_FLOOR_UNITS)
    return counts * units // (HEAD_FLOOR_UNITS * num_kv_heads) if units else 0


def kept_places(kept: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """The column, layer * num_kv_heads + head, and the token of each tape place. int64 both."""
    columns = torch.arange(len(kept.offsets) - 1, device=kept.offsets.device)
    owner = columns.repeat_interleave(kept.counts.view(-1), output_size=len(kept.tape_tokens))
    return owner, kept.tape_tokens.long()


def tape_scores(prompt: PromptView, ranking: Ranking, kept: Selection) -> torch.Tensor:
    """Each kept entry's score in tape order, [num_layers * num_kv_heads * budget]; infinite in the
    window."""
    owner, tokens = kept_places(kept)
    place, last = tokens - prompt.shared_prefix_len, prompt.scored_len - 1
    scores = ranking.scores.flatten(0, 1)[owner, place.clamp(max=last)]
    return scores.where(place <= last, float("inf"))


class Trim(NamedTuple):
    """What stays of a tape."""

    places: torch.Tensor  # int64 [num_layers * num_kv_heads * new budget], of the old tape
    offsets: torch.Tensor  # int32 [num_layers * num_kv_heads + 1], of the new tape


def keep_fewer(
    method: Method,
    scores: torch.Tensor,
    offsets: torch.Tensor,
    layer_weights: torch.Tensor,
    suffix_len: int,
    window_size: int,
    budget: int,
    width: int | None = None,
) -> Trim:
    """What `choose` would have kept at a smaller budget, chosen from what was kept.

    scores: [num_layers * num_kv_heads * old budget], of `tape_scores`.
    offsets: int32 [num_layers * num_kv_heads + 1], first tape place of each head.
    layer_weights: float32 [num_layers], of the ranking. suffix_len: N, tokens.
    width: at least the longest piece of a head; N, if answers have not been compressed since.
    The same entries as `choose` keeps, ties included: the layer split is monotone in the budget.
    With a head floor whose rounding is not, an entry or two may differ. Reads nothing back to the
    host on a GPU.
    """
    columns, num_layers = len(offsets) - 1, len(layer_weights)
    num_kv_heads = columns // num_layers
    starts = offsets[:-1].long()
    # Each head's piece as a row: the order in a head is the order of its tokens.
    owner = torch.arange(columns, device=offsets.device).repeat_interleave(
        offsets.diff(), output_size=len(scores)
    )
    place = torch.arange(len(scores), device=offsets.device)
    width = suffix_len if width is None else width
    by_head = torch.full((columns, width), float("-inf"), device=offsets.device)
    by_head[owner, place - starts[owner]] = scores.float()
    counts, floor = divide(
        method, layer_weights, num_kv_heads, suffix_len - window_size, budget - window_size
    )
    by_head = by_head.view(len(counts), -1, width)
    if isinstance(floor, torch.Tensor):
        floor = floor + window_size
    kept = select(by_head, counts + by_head.shape[1] * window_size, budget, 0, 0, floor)
    owner, index = kept_places(kept)
    return Trim(starts[owner] + index, kept.offsets)


def keep_again(
    method: Method, scores: torch.Tensor, offsets: torch.Tensor, window_size: int, budget: int
) -> Selection:
    """A tape of the same budget, chosen from what was kept and from the answer since.

    scores: float32 [num_layers, num_kv_heads, places], of `tail_scores`. offsets: int32
    [num_layers * num_kv_heads + 1], of the old tape. Layers keep as many entries as they had; where
    the method's heads compete, they do so again. In the result a token is an index into `places`.
    Reads nothing back to the host on a GPU.
    """
    num_layers, num_kv_heads, places = scores.shape
    counts = offsets.diff().long()
    floor: int | torch.Tensor = 0
    if not (method.uniform_heads or method.config.uniform_heads):
        counts = counts.view(num_layers, num_kv_heads).sum(dim=1)
        floor = _floor(method, counts - num_kv_heads * window_size, num_kv_heads)
    if isinstance(floor, torch.Tensor):
        floor = floor + window_size
    return select(scores.view(len(counts), -1, places), counts, budget, 0, 0, floor)
