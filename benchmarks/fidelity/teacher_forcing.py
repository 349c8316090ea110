# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing over what is left of a prompt: new tokens attend to kept entries and each other.

Entries stay at their positions, and the new tokens' own are never dropped: what a request of the
server sees between its compression and its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lava_sglang.kernels.select import Selection
from lava_sglang.tools.inspection.prefill import Prefill, forward, seen_by

Key = TypeVar("Key")

Columns = list[Tensor]
"""Kept prompt tokens of each head, int64, ascending; L * H of them, layer by layer."""


def kept_columns(selection: Selection, shared_prefix_len: int = 0) -> Columns:
    """The tokens that decode reads: the shared prefix and the head's piece of the tape."""
    tape = selection.tape_tokens.long()
    prefix = torch.arange(shared_prefix_len, device=tape.device)
    pieces = tape.split(selection.counts.flatten().tolist())
    return [torch.cat([prefix, piece]) for piece in pieces]


@torch.no_grad()
def continuation_logits(
    model: Any, prefill: Prefill, tokens: Sequence[int], kept: Sequence[Columns | None]
) -> Tensor:
    """Logits [B, T, vocabulary] after each of T new tokens, in one forward pass.

    tokens: fed right after the prompt. kept: one choice of entries for each of the B rows; None
    keeps the whole prompt. `prefill` is read only.
    """
    batch = torch.tensor([list(tokens)] * len(kept), device=model.device)
    return forward(model, batch, prefill.prompt_len, _KeptPass(prefill, kept, len(tokens)))


def continuations(
    model: Any,
    prefill: Prefill,
    tokens: Sequence[int],
    choices: Mapping[Key, Columns | None],
    batch_tokens: int,
) -> Iterator[tuple[Key, Tensor]]:
    """Each key with its row of `continuation_logits`, [T, vocabulary]; `batch_tokens` or fewer new
    tokens in a forward pass, but at least one row."""
    rows = max(1, batch_tokens // len(tokens))
    keys = list(choices)
    for start in range(0, len(keys), rows):
        part = keys[start : start + rows]
        logits = continuation_logits(model, prefill, tokens, [choices[key] for key in part])
        yield from zip(part, logits, strict=True)


@torch.no_grad()
def greedy(model: Any, prefill: Prefill, count: int, end_tokens: Sequence[int] = ()) -> list[int]:
    """Up to `count` tokens of the exact prompt's own answer, to before the first end token."""
    answer: list[int] = []
    tail = _GreedyPass(prefill, count)
    logits = prefill.logits
    assert logits is not None
    while len(answer) < count:
        token = int(logits.argmax())
        if token in end_tokens:
            break
        answer.append(token)
        fed = torch.tensor([[token]], device=model.device)
        tail.length = len(answer)
        logits = forward(model, fed, prefill.prompt_len + len(answer) - 1, tail)[0, -1]
    return answer


class _KeptPass:
    """Attention of T new tokens in B rows, each with its own entries in every head."""

    def __init__(self, prefill: Prefill, kept: Sequence[Columns | None], count: int):
        self.arena = prefill.arena[:, :, : prefill.prompt_len]
        self.kept = kept
        self.count = count
        self.masks: dict[int, Tensor] = {}  # by reach

    def _mask(self, reach: int) -> Tensor:
        """[T, I + T]: a row of n kept entries uses the last n + T columns. Layers of a limited
        reach keep the last tokens, so that what they see stands next to each other."""
        if reach not in self.masks:
            start, device = self.arena.shape[2], self.arena.device
            seen = seen_by(start, start + self.count, reach, device)
            hidden = torch.zeros(seen.shape, dtype=self.arena.dtype, device=device)
            self.masks[reach] = hidden.masked_fill_(~seen, float("-inf"))
        return self.masks[reach]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: int
    ) -> Tensor:
        heads, whole_mask = key.shape[1], self._mask(reach)
        new = torch.stack([key, value])  # [2, B, H, T, D]
        groups = query.unflatten(1, (heads, -1))  # [B, H, G, T, D]
        output = torch.empty_like(groups)
        for row, columns in enumerate(self.kept):
            for head in range(heads):
                entries = self.arena[layer, :, :, head]  # [2, I, D]
                if columns is not None:
                    entries = entries[:, columns[layer * heads + head]]
                keys, values = torch.cat([entries, new[:, row, head]], dim=1)
                # A copy: CUDA's kernels read a mask from an aligned address.
                mask = whole_mask[:, -len(keys) :].contiguous()
                output[row, head] = F.scaled_dot_product_attention(
                    groups[row, head][None],
                    keys.expand(1, groups.shape[2], -1, -1),
                    values.expand(1, groups.shape[2], -1, -1),
                    mask,
                    scale=scale,
                )[0]
        return output.flatten(1, 2)


class _GreedyPass:
    """Attention of one new token after another over the whole prompt; `length` are there so far."""

    def __init__(self, prefill: Prefill, most: int):
        arena = prefill.arena
        self.prompt_len = prefill.prompt_len
        self.length = 0
        tail = arena.new_empty(*arena.shape[:2], most, *arena.shape[3:])
        self.arena = torch.cat([arena[:, :, : self.prompt_len], tail], dim=2)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: int
    ) -> Tensor:
        end = self.prompt_len + self.length
        self.arena[layer, 0, end - 1] = key[0, :, 0]
        self.arena[layer, 1, end - 1] = value[0, :, 0]
        first = max(0, end - reach) if reach else 0
        keys, values = self.arena[layer, :, first:end].transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
