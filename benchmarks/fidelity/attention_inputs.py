# SPDX-License-Identifier: Apache-2.0
"""What went into a model's attention layers during an exact prefill, for those who score by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lava_sglang.tools.inspection.prefill import Prefill


class LayerInput(NamedTuple):
    """One attention layer and its prompt of N tokens; Q query heads, H KV heads, D head dim."""

    module: torch.nn.Module
    hidden: Tensor  # [1, N, hidden size], after the layer's norm
    keys: Tensor  # [1, H, N, D], after RoPE
    values: Tensor  # [1, H, N, D]
    rotary: tuple[Tensor, Tensor]  # cos and sin of the N positions, [1, N, D] each


class AttentionInputs:
    """Filled while a model of `load_model` prefills in chunks; one prompt only."""

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.get_decoder()
        self.modules: list[Any] = [layer.self_attn for layer in self.decoder.layers]
        self.rotary_emb = self.decoder.rotary_emb
        self._tokens: list[Tensor] = []
        self._hidden: list[list[Tensor]] = [[] for _ in self.modules]
        self._rotary: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[AttentionInputs]:
        hooks = [
            module.register_forward_pre_hook(partial(self._record, layer), with_kwargs=True)
            for layer, module in enumerate(self.modules)
        ]
        hooks.append(self.decoder.register_forward_pre_hook(self._record_tokens, with_kwargs=True))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def tokens(self, exact: Prefill) -> Tensor:
        """int64 [1, N]: the prompt. exact: as for `layers`."""
        return torch.cat(self._tokens, dim=1)[:, : exact.prompt_len]

    def layers(self, exact: Prefill) -> Iterator[LayerInput]:
        """Every layer in turn. exact: the prefill that was recorded, or a beginning of it."""
        count = exact.prompt_len
        cos, sin = (torch.cat(parts, dim=1)[:, :count] for parts in zip(*self._rotary, strict=True))
        for module, hidden, arena in zip(self.modules, self._hidden, exact.arena, strict=True):
            keys, values = arena[:, :count].transpose(1, 2)[:, None].contiguous()
            yield LayerInput(module, torch.cat(hidden, dim=1)[:, :count], keys, values, (cos, sin))

    def _record_tokens(self, decoder: Any, positional: tuple[Any, ...], named: Any) -> None:
        self._tokens.append(named["input_ids"])

    def _record(
        self, layer: int, module: torch.nn.Module, positional: tuple[Any, ...], named: Any
    ) -> None:
        self._hidden[layer].append(named["hidden_states"])
        if layer == 0:
            self._rotary.append(named["position_embeddings"])
