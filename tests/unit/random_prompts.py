# SPDX-License-Identifier: Apache-2.0
"""Random prompts as a method sees them, of chosen or drawn shapes, and what was kept of them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from lava_sglang.kernels.select import Selection
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import PromptView
from tests.oracle import How, Prefill, window_attention

HEAD_DIM = 8
SCALING = HEAD_DIM**-0.5
NUM_LAYERS = 3


class Shape(NamedTuple):
    prompt_len: int
    shared_prefix_len: int
    window_size: int
    num_queries: int  # below window_size where the tree's prefix covered part of the window
    num_kv_heads: int
    group: int
    pool_width: int
    budget: int


@st.composite
def small_shapes(draw: st.DrawFn) -> Shape:
    """Every corner that the scheduler can send: at least one scored token, one kept of a head."""
    window_size = draw(st.integers(1, 5))
    shared_prefix_len = draw(st.integers(0, 5))
    scored_len = draw(st.integers(1, 12))
    return Shape(
        prompt_len=shared_prefix_len + scored_len + window_size,
        shared_prefix_len=shared_prefix_len,
        window_size=window_size,
        num_queries=draw(st.integers(1, window_size)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 2)),
        pool_width=draw(st.sampled_from([1, 3, 7])),
        budget=window_size + draw(st.integers(1, scored_len)),
    )


def random_prompt(
    shape: Shape, seed: int = 0, num_layers: int = NUM_LAYERS, distinct: int | None = None
) -> PromptView:
    """Entries in slots of any order; layers differ in how sharply they attend.

    distinct: so many tokens, over and over: their scores tie.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = shape.num_kv_heads * shape.group
    num_slots = shape.prompt_len + 5
    slots = torch.randperm(num_slots, generator=generator)[: shape.prompt_len]
    if distinct is not None:
        slots = slots[torch.arange(shape.prompt_len) % distinct]
    return PromptView(
        arena=torch.randn(
            num_layers, 2, num_slots, shape.num_kv_heads, HEAD_DIM, generator=generator
        ),
        slots=slots,
        layers=LayerMap.plain(num_layers),
        queries=torch.randn(num_layers, shape.num_queries, heads, HEAD_DIM, generator=generator),
        scaling=SCALING * torch.arange(1, num_layers + 1),
        shared_prefix_len=shape.shared_prefix_len,
        window_size=shape.window_size,
    )


def heads_of(kept: Selection, prompt: PromptView) -> list[list[list[int]]]:
    """[num_layers][num_kv_heads][kept], positions in the prompt. Its parts agree."""
    columns = prompt.num_layers * prompt.num_kv_heads
    assert {part.dtype for part in kept} == {torch.int32}
    assert kept.counts.shape == (prompt.num_layers, prompt.num_kv_heads)
    assert kept.offsets.shape == (columns + 1,) and kept.offsets[0] == 0
    assert torch.equal(kept.offsets.diff(), kept.counts.flatten())
    assert kept.offsets[-1] == len(kept.tape_tokens)
    pieces = [piece.tolist() for piece in kept.tape_tokens.split(kept.counts.flatten().tolist())]
    size = prompt.num_kv_heads
    return [pieces[i : i + size] for i in range(0, columns, size)]


def prefill_of(prompt: PromptView) -> Prefill:
    """The same prompt as the oracle sees it, in float64."""
    assert prompt.queries is not None and prompt.scaling is not None
    keys, values = prompt.arena[:, :, prompt.slots].double().transpose(2, 3).unbind(1)
    queries = prompt.queries.double().transpose(1, 2)
    prompt_len, num_queries = len(prompt.slots), queries.shape[2]
    recorded = [
        window_attention(*layer, prompt_len - num_queries, How(float(scale)))
        for *layer, scale in zip(queries, keys, prompt.scaling, strict=True)
    ]
    mean, rms = (torch.stack(part) for part in zip(*recorded, strict=True))
    return Prefill(
        input_ids=[0] * prompt_len,
        window_start=prompt_len - prompt.window_size,
        keys=keys,
        values=values,
        logits=torch.empty(0),
        window_queries=queries,
        window_attention=mean,
        window_rms=rms,
        reach=[None] * prompt.num_layers,
    )
