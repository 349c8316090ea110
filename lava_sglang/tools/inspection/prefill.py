# SPDX-License-Identifier: Apache-2.0
"""Runs a prompt through a transformers model and leaves what a method reads: a `PromptView`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import PromptView

ATTENTION = "lava_inspection"
CHUNK_TOKENS = 1024

# What some models add to attention, and the passes here do not.
_UNSUPPORTED = ("softcap", "s_aux")


class AttentionPass(Protocol):
    """What computes attention during one call of the model. Batch of B, Q query heads, H KV heads,
    T new tokens, D head dim; keys and queries after RoPE."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: int
    ) -> Tensor:
        """[B, Q, T, D] of query [B, Q, T, D], key and value [B, H, T, D] of the new tokens.

        reach: the last tokens that one sees, itself included; 0: all.
        """


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    random_weights: bool = False,
) -> Any:
    """The causal language model of a folder or hub name, for `forward` and `prefill`.

    random_weights: read the configuration only, as SGLang's `--load-format dummy`.
    """
    if random_weights:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path), dtype=dtype, attn_implementation=ATTENTION
            )
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(device).eval()


class Prefill(NamedTuple):
    """A prompt of I tokens after its exact forward pass. L layers, w window tokens."""

    prompt_len: int  # I
    arena: Tensor  # [L, 2, I or more, H, D], keys after RoPE; slot i holds token i
    layers: LayerMap
    queries: Tensor  # [full layers, w, Q, D], after RoPE, of the last w tokens
    scaling: Tensor  # float32 [full layers], factor on the attention logits
    logits: Tensor | None  # [vocabulary], of the last token; None if the pass went on after it

    def view(self, window_size: int, shared_prefix_len: int = 0) -> PromptView:
        """The prompt as `lava_sglang.policy.keep` takes it.

        window_size: at most the prefill's w. Raises ValueError if no token would be scored.
        """
        if not 1 <= window_size <= self.queries.shape[1]:
            raise ValueError(
                f"window_size={window_size}: accepts 1 to {self.queries.shape[1]}, "
                "the queries that the prefill recorded"
            )
        most = self.prompt_len - window_size - 1
        if not 0 <= shared_prefix_len <= most:
            raise ValueError(f"shared_prefix_len={shared_prefix_len}: accepts 0 to {most}")
        return PromptView(
            arena=self.arena,
            slots=torch.arange(self.prompt_len, device=self.arena.device),
            layers=self.layers,
            queries=self.queries[:, -window_size:].contiguous(),
            scaling=self.scaling,
            shared_prefix_len=shared_prefix_len,
            window_size=window_size,
        )

    def without_last(self, count: int) -> Prefill:
        """The same prompt before its last `count` tokens, w smaller by as many. Copies nothing."""
        most = self.queries.shape[1] - 1
        if not 1 <= count <= most:
            raise ValueError(f"count={count}: accepts 1 to {most}, less than the recorded queries")
        return self._replace(
            prompt_len=self.prompt_len - count, queries=self.queries[:, :-count], logits=None
        )


@torch.no_grad()
def prefill(
    model: Any, input_ids: Sequence[int], window_size: int, chunk_tokens: int = CHUNK_TOKENS
) -> Prefill:
    """One exact forward pass, in chunks. model: of `load_model`. window_size: queries to record."""
    if not 1 <= window_size < len(input_ids):
        raise ValueError(f"window_size={window_size}: accepts 1 to {len(input_ids) - 1}")
    config = model.config.get_text_config()
    record = _PrefillPass(config.num_hidden_layers, len(input_ids), window_size)
    tokens = torch.tensor([list(input_ids)], device=model.device)
    logits = tokens.new_empty(0)
    for start in range(0, len(input_ids), chunk_tokens):
        record.start = start
        chunk = tokens[:, start : start + chunk_tokens]
        logits = forward(model, chunk, start, record, logits_to_keep=1)[0, -1]
    sliding = [layer for layer, reach in enumerate(record.reach) if reach]
    layers = LayerMap(range(len(record.reach)), sliding, max(record.reach), tokens.device)
    full = list(layers.full)
    scaling = torch.tensor(record.scaling, device=tokens.device)[full]
    return Prefill(len(input_ids), record.arena, layers, record.queries[full], scaling, logits)


@torch.no_grad()
def forward(
    model: Any,
    tokens: Tensor,
    first_position: int,
    attention: AttentionPass,
    logits_to_keep: int = 0,
) -> Tensor:
    """Logits [B, T or logits_to_keep, vocabulary] of int64 [B, T] tokens, the first of which stands
    at `first_position`; the KV cache is the pass's own affair."""
    positions = torch.arange(first_position, first_position + tokens.shape[1], device=tokens.device)
    output = model(
        input_ids=tokens,
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=logits_to_keep,
        attention_pass=attention,
    )
    logits: Tensor = output.logits
    return logits


class _PrefillPass:
    """Causal attention of a batch of one, chunk after chunk; writes the arena as it goes."""

    def __init__(self, num_layers: int, prompt_len: int, window_size: int):
        self.num_layers = num_layers
        self.prompt_len = prompt_len
        self.window_size = window_size
        self.start = 0  # of the chunk
        self.arena = self.queries = torch.empty(0)
        self.scaling = [0.0] * num_layers
        self.reach = [0] * num_layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: int
    ) -> Tensor:
        _, heads, count, dim = key.shape
        if not self.arena.numel():
            self.arena = key.new_empty(self.num_layers, 2, self.prompt_len, heads, dim)
            self.queries = key.new_empty(
                self.num_layers, self.window_size, query.shape[1], query.shape[3]
            )
        end = self.start + count
        self.arena[layer, 0, self.start : end] = key[0].transpose(0, 1)
        self.arena[layer, 1, self.start : end] = value[0].transpose(0, 1)
        self.scaling[layer], self.reach[layer] = scale, reach
        self._stash(layer, query)
        # [1, H, end, D]
        keys, values = self.arena[layer, :, :end].transpose(1, 2)[:, None]
        plain = self.start == 0 and not reach
        mask = None if plain else seen_by(self.start, end, reach, query.device)
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    def _stash(self, layer: int, query: Tensor) -> None:
        """The part of the window's queries that this chunk holds."""
        window_start = self.prompt_len - self.window_size
        first = max(self.start, window_start)
        rows = query[0, :, first - self.start :].transpose(0, 1)
        place = first - window_start
        self.queries[layer, place : place + len(rows)] = rows


def seen_by(start: int, end: int, reach: int, device: torch.device) -> Tensor:
    """bool [end - start, end]: what the tokens from `start` to `end` see."""
    tokens = torch.arange(end, device=device)
    distance = tokens[start:, None] - tokens[None, :]
    return (distance >= 0) & (distance < (reach or end))


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    *,
    scaling: float,
    attention_pass: AttentionPass,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention call, handed to the pass in progress."""
    found = [name for name in _UNSUPPORTED if extras.get(name) is not None]
    if found:
        raise NotImplementedError(f"{type(module).__name__}: attention with {', '.join(found)}")
    layer = int(module.layer_idx)
    output = attention_pass.attend(layer, query, key, value, scaling, sliding_window or 0)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
