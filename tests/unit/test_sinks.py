# SPDX-License-Identifier: Apache-2.0
"""What the scores make of an attention sink: much attention, a small value.

A sink holds the attention of queries that need nothing. Dropping it gives that attention to the
other entries, which changes the output by a / (1 - a) times its distance from the output, however
small its value is. `lava_span` scores what an entry adds to the output, which is little: it drops
the sink. `lava` and `snapkv` keep it. This is known, and said in policy/README.md; a model with
attention sinks of its own is refused.
"""

import pytest
import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import PromptView, keep, method_of

TOKENS, WINDOW, HEADS, DIM = 40, 4, 2, 16
SINK, SHARE = 5, 0.2


def prompt_with_a_sink() -> PromptView:
    """Every window query gives the sink a fifth of its attention, and all others alike."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros(TOKENS, HEADS, DIM)
    others = TOKENS - WINDOW
    keys[SINK, :, 0] = torch.log(torch.tensor(others * SHARE / (1 - SHARE))).item()
    values = torch.randn(TOKENS, HEADS, DIM, generator=generator)
    values[SINK] *= 0.01
    queries = torch.zeros(1, WINDOW, HEADS, DIM)
    queries[..., 0] = 1.0
    arena = torch.stack([keys, values])[None]
    layers = LayerMap.plain(1)
    return PromptView(arena, torch.arange(TOKENS), layers, queries, torch.ones(1), 0, WINDOW)


@pytest.mark.parametrize(
    ("method", "kept"), [("lava", True), ("snapkv", True), ("lava_span", False)]
)
def test_who_keeps_a_sink_with_a_small_value(method: str, kept: bool) -> None:
    config = KVCompressionConfig(method=method, window_size=WINDOW, pool_width=1)
    found = keep(method_of(config), prompt_with_a_sink(), 12)
    for start, end in zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True):
        assert (SINK in found.tape_tokens[start:end].tolist()) is kept


def test_a_value_that_all_entries_share_changes_the_choice_though_not_the_loss() -> None:
    """The other side of the same score: attention sums to one, so a constant changes no output."""
    config = KVCompressionConfig(method="lava_span", window_size=WINDOW)
    prompt = prompt_with_a_sink()
    moved = prompt._replace(arena=prompt.arena.clone())
    moved.arena[:, 1] += 3.0
    choices = [keep(method_of(config), view, 12).tape_tokens.tolist() for view in (prompt, moved)]
    assert choices[0] != choices[1]
