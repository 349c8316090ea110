# SPDX-License-Identifier: Apache-2.0
"""How the window's attention becomes a score: what methods with queries differ in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreOptions:
    """As `reference.importance_ref` and `window_attention_ref` read them. Defaults are LAVa's."""

    query_weights: torch.Tensor | None = None
    """float32 [window queries] with the sum 1, of the mean over them; None: all alike."""

    root_mean_square: bool = False
    """The quadratic mean in place of the arithmetic one."""

    pool_width: int = 7
    """Odd; the maximum over so many neighbours, clipped to the scored tokens."""

    span: int = 0
    """A token also lifts so many scored tokens after it."""

    span_share: float = 1.0
    """What it lifts them to, of its own; in (0, 1]."""

    group_reduce: str = "max"
    """'max' or 'mean', over the query heads of a KV head, after pooling."""

    value_norm: str = "head"
    """'token', times the L2 norm of the token's value, before pooling; 'head', times the largest L1
    norm of the head's scored values; or 'none'."""

    def __post_init__(self) -> None:
        assert self.pool_width % 2 == 1, f"pool_width={self.pool_width}: odd"
        assert self.span >= 0 and 0 < self.span_share <= 1, (self.span, self.span_share)
        assert self.group_reduce in ("max", "mean"), self.group_reduce
        assert self.value_norm in ("token", "head", "none"), self.value_norm


LAVA = ScoreOptions()
