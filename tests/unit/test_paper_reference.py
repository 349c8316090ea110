# SPDX-License-Identifier: Apache-2.0
"""Ours against the arithmetic of the papers' reference code, wherever that code is well defined.

The functions `paper_*` are that arithmetic written anew, for one prompt without a shared prefix:
the code base of LAVa (arXiv 2509.09754), which holds AdaKV, SnapKV and PyramidKV too.

Compared, with identical kept sets: each layer's selection, given the same layer budget, of all four
methods. Compared up to rounding: scores, LAVa's layer shares and PyramidKV's layer budgets. The
sums: ours are L * H * b exactly, theirs as stated here.

Where theirs is not well defined, or ours differs on purpose:

- Ties: their `topk` and unstable sort leave them open. Ours go to the lower (head, token).
  Compared where the last kept score is not tied; elsewhere by the value of what is kept.
- Scores and entropies are rounded to the model's dtype, bfloat16 has ties everywhere. Ours are
  float32. Compared in float32.
- A layer gets b_l = int(share * (B - w) * L) entries a head, so the sum falls short by up to L - 1
  entries a head. Ours divides single entries by Webster's method, exactly.
- An IndexError where some b_l > N - w, and 0 / 0 with a single entry. In ours the layer is full
  and the rest goes to others. Compared where all b_l <= N - w.
- A head keeps round((1 - a) * hits + floor) entries, so the sum is near H * b_l. In ours the floor
  is a guarantee and the rest are the layer's best, exactly H * b_l. Compared at a = 0.
- LAVa's floor stays int(a * B) of the first budget, window included: the attribute that should
  follow the layer is misspelt. That is about a * w entries a head too many, and pulls layers
  together. Our `head_floor` is a share of the layer's own mean.
- AdaKV and SnapKV average the query heads of a group before pooling, ours after. Compared without
  groups or without pooling.
- PyramidKV goes down in whole steps, so its sum is too large by up to L / 2 entries a head and
  layer. Ours is exact.
- Batch of one, every prompt alone: no shared prefix, no chunks. Compared so.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.select import select
from lava_sglang.policy import Method, PromptView, keep, method_of
from tests.unit.random_prompts import Shape, heads_of, random_prompt, small_shapes

ROUNDING = 1e-5  # relative: closer scores count as tied
FLOOR_SHARE = 0.2  # a, in the scripts of LAVa and AdaKV

each_shape = given(
    shape=small_shapes()
    .map(
        lambda shape: shape._replace(
            prompt_len=shape.prompt_len - shape.shared_prefix_len,
            shared_prefix_len=0,
            num_queries=shape.window_size,
        )
    )
    .filter(lambda shape: shape.num_kv_heads * (shape.prompt_len - shape.window_size) > 1),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
many = settings(max_examples=300, deadline=None, derandomize=True)


def paper_attention(prompt: PromptView, layer: int) -> torch.Tensor:
    """[query heads, N - w]: mean over the window's causal softmax over the whole prompt."""
    assert prompt.queries is not None and prompt.scaling is not None
    queries = prompt.queries[layer].transpose(0, 1)  # [query heads, w, D]
    keys = prompt.arena[layer, 0, prompt.slots].transpose(0, 1)  # [KV heads, N, D]
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    logits = queries @ keys.transpose(1, 2) * prompt.scaling[layer]
    window = prompt.window_size
    future = torch.full((window, window), torch.finfo(logits.dtype).min).triu(1)
    logits[:, :, -window:] += future
    return logits.softmax(dim=-1)[:, :, :-window].mean(dim=1)


def paper_lava_scores(prompt: PromptView, layer: int, pool_width: int) -> torch.Tensor:
    """[KV heads, N - w]."""
    pooled = F.max_pool1d(paper_attention(prompt, layer)[None], pool_width, 1, pool_width // 2)[0]
    values = prompt.arena[layer, 1, prompt.slots[: -prompt.window_size]]  # [N - w, KV heads, D]
    norms = values.norm(p=1, dim=-1).max(dim=0).values
    group = len(pooled) // len(norms)
    weighed = pooled * norms.repeat_interleave(group)[:, None]
    return weighed.unflatten(0, (-1, group)).max(dim=1).values


def paper_snapkv_scores(prompt: PromptView, layer: int, pool_width: int) -> torch.Tensor:
    """[KV heads, N - w], of AdaKV and PyramidKV too: the group's mean, then pooled."""
    mean = paper_attention(prompt, layer).unflatten(0, (prompt.num_kv_heads, -1)).mean(dim=1)
    return F.max_pool1d(mean[None], pool_width, 1, pool_width // 2)[0]


def paper_entropy(score: torch.Tensor) -> float:
    """Of one layer's scores [KV heads, N - w], over its largest possible value."""
    share = score.flatten() / score.sum()
    return float(-(share * share.log()).nansum() / math.log(share.numel()))


def paper_layer_budgets(entropies: list[float], mean: int) -> list[int]:
    """Entries a head after the last layer. It trims after each layer, to what only shrinks, so what
    is left is the same as trimmed once."""
    return [int(e / sum(entropies) * mean * len(entropies)) for e in entropies]


def paper_pyramid_budgets(num_layers: int, mean: int, scored_len: int) -> list[int]:
    """Entries a head, layer by layer: whole steps down to a twentieth."""
    least = mean // 20
    most = 2 * mean - least
    if most >= scored_len:
        most, least = scored_len, 2 * mean - scored_len
    step = (most - least) // (num_layers - 1)
    return [most - layer * step for layer in range(num_layers)]


def paper_heads(score: torch.Tensor, per_head: int, alpha: float, floor: int) -> list[list[int]]:
    """One layer, [KV heads][kept]: hits in the layer's best, mixed with a floor, then each head's
    best so many."""
    num_kv_heads, scored_len = score.shape
    best = score.flatten().topk(num_kv_heads * per_head).indices
    hits = (best // scored_len).bincount(minlength=num_kv_heads)
    lengths = (hits * (1 - alpha) + floor).round().int().tolist()
    order = score.sort(dim=-1, descending=True).indices
    return [sorted(order[head, :length].tolist()) for head, length in enumerate(lengths)]


def well_defined(score: torch.Tensor, count: int) -> bool:
    """Whether the `count` best of these scores are the same however their ties are broken."""
    ordered = score.flatten().sort(descending=True).values
    if count in (0, len(ordered)):
        return True
    last, next_one = ordered[count - 1 : count + 1].tolist()
    return last - next_one > ROUNDING * last


def method_for(shape: Shape, name: str, **rules: object) -> Method:
    values = {"method": name, "window_size": shape.window_size, "pool_width": shape.pool_width}
    return method_of(KVCompressionConfig.parse({**values, **rules}))


def scored_part(kept: list[list[int]], prompt: PromptView) -> list[list[int]]:
    """Kept tokens of one layer without the window."""
    return [tokens[: len(tokens) - prompt.window_size] for tokens in kept]


def value_of(score: torch.Tensor, kept: list[list[int]]) -> float:
    return sum(float(score[head, tokens].sum()) for head, tokens in enumerate(kept))


def assert_same_layer(
    score: torch.Tensor, ours: list[list[int]], theirs: list[list[int]], count: int
) -> None:
    """The same entries where no tie decides; entries of the same value elsewhere."""
    if well_defined(score, count):
        assert ours == theirs
    assert sum(map(len, ours)) == sum(map(len, theirs)) == count
    assert value_of(score, ours) == pytest.approx(value_of(score, theirs), rel=1e-4)


@many
@each_shape
def test_lava_scores_and_keeps_what_the_paper_does(
    shape: Shape, num_layers: int, seed: int
) -> None:
    """Given the paper's layer budgets. With one layer, nothing is left to round: `keep` itself."""
    prompt = random_prompt(shape, seed, num_layers)
    method = method_for(shape, "lava")
    scores = method.score(prompt)
    theirs = [paper_lava_scores(prompt, layer, shape.pool_width) for layer in range(num_layers)]
    torch.testing.assert_close(scores, torch.stack(theirs), rtol=ROUNDING, atol=1e-9)
    mean = shape.budget - shape.window_size
    budgets = paper_layer_budgets([paper_entropy(score) for score in theirs], mean)
    if max(budgets) > prompt.scored_len:
        return  # an IndexError there
    counts = torch.tensor(budgets) * shape.num_kv_heads
    kept = select(scores, counts, shape.budget, 0, shape.window_size)
    if num_layers == 1:
        assert budgets == [mean]
        kept = keep(method, prompt, shape.budget)
    ours = heads_of(kept._replace(counts=kept.counts.view(num_layers, -1)), prompt)
    for layer, score in enumerate(theirs):
        chosen = paper_heads(score, budgets[layer], 0.0, 0)
        assert_same_layer(score, scored_part(ours[layer], prompt), chosen, int(counts[layer]))


@many
@each_shape
def test_lavas_layer_shares_are_the_papers_before_rounding(
    shape: Shape, num_layers: int, seed: int
) -> None:
    prompt = random_prompt(shape, seed, num_layers)
    method = method_for(shape, "lava")
    entropies = [
        paper_entropy(paper_lava_scores(prompt, layer, shape.pool_width))
        for layer in range(num_layers)
    ]
    assert method.layer_weights(method.score(prompt)).tolist() == pytest.approx(entropies, rel=1e-4)
    mean = shape.budget - shape.window_size
    total = num_layers * shape.num_kv_heads * mean
    shares = [entropy / sum(entropies) * total for entropy in entropies]
    kept = keep(method, prompt, shape.budget).counts.sum(dim=1)
    ours = (kept - shape.num_kv_heads * shape.window_size).tolist()
    theirs = [shape.num_kv_heads * b for b in paper_layer_budgets(entropies, mean)]
    assert sum(ours) == total
    assert total - num_layers * shape.num_kv_heads < sum(theirs) <= total
    if max(shares) <= shape.num_kv_heads * prompt.scored_len:
        assert all(abs(o - share) < 1.001 for o, share in zip(ours, shares, strict=True))


def test_the_papers_typo_keeps_more_than_its_budget() -> None:
    """Realised mean of about B + a * w, and flatter layers; ours is B."""
    shape = Shape(600, 0, 32, 32, 4, 2, 7, 128)
    prompt = random_prompt(shape, num_layers=4)
    scores = [paper_lava_scores(prompt, layer, 7) for layer in range(4)]
    mean = shape.budget - shape.window_size
    budgets = paper_layer_budgets([paper_entropy(score) for score in scores], mean)
    floor = int(FLOOR_SHARE * shape.budget)
    typo = [paper_heads(*layer, FLOOR_SHARE, floor) for layer in zip(scores, budgets, strict=True)]
    realised = sum(len(head) + 32 for layer in typo for head in layer) / 16
    assert realised == pytest.approx(shape.budget + FLOOR_SHARE * shape.window_size, abs=1.5)
    kept = keep(method_for(shape, "lava", head_floor=FLOOR_SHARE), prompt, shape.budget)
    assert kept.counts.sum() == 16 * shape.budget
    assert (kept.counts - 32).min() >= math.floor(FLOOR_SHARE * min(budgets))


@many
@each_shape
def test_adakv_without_a_floor_keeps_what_the_paper_does(
    shape: Shape, num_layers: int, seed: int
) -> None:
    shape = without_pooled_groups(shape)
    prompt = random_prompt(shape, seed, num_layers)
    mean = shape.budget - shape.window_size
    count = shape.num_kv_heads * mean
    ours = heads_of(keep(method_for(shape, "adakv", head_floor=0), prompt, shape.budget), prompt)
    for layer in range(num_layers):
        score = paper_snapkv_scores(prompt, layer, shape.pool_width)
        chosen = paper_heads(score, mean, 0.0, 0)
        assert_same_layer(score, scored_part(ours[layer], prompt), chosen, count)


@many
@each_shape
def test_adakvs_floor_holds_in_both_readings(shape: Shape, num_layers: int, seed: int) -> None:
    """Theirs mixes, ours guarantees: every head's best int(a * b) are kept by both, and where all
    heads have so many hits anyway, ours is the choice without a floor."""
    shape = without_pooled_groups(shape)
    prompt = random_prompt(shape, seed, num_layers)
    mean = shape.budget - shape.window_size
    floor = int(FLOOR_SHARE * mean)
    ours = heads_of(keep(method_for(shape, "adakv"), prompt, shape.budget), prompt)
    for layer in range(num_layers):
        score = paper_snapkv_scores(prompt, layer, shape.pool_width)
        kept = scored_part(ours[layer], prompt)
        mixed = paper_heads(score, mean, FLOOR_SHARE, floor)
        assert min(map(len, kept)) >= floor and min(map(len, mixed)) >= floor
        free = paper_heads(score, mean, 0.0, 0)
        if min(map(len, free)) >= floor:
            assert_same_layer(score, kept, free, shape.num_kv_heads * mean)


@many
@each_shape
def test_snapkv_keeps_what_the_paper_does(shape: Shape, num_layers: int, seed: int) -> None:
    shape = without_pooled_groups(shape)
    prompt = random_prompt(shape, seed, num_layers)
    mean = shape.budget - shape.window_size
    ours = heads_of(keep(method_for(shape, "snapkv"), prompt, shape.budget), prompt)
    for layer in range(num_layers):
        score = paper_snapkv_scores(prompt, layer, shape.pool_width)
        kept = scored_part(ours[layer], prompt)
        for head in range(shape.num_kv_heads):
            alone = score[head : head + 1]
            assert_same_layer(alone, [kept[head]], paper_heads(alone, mean, 0.0, 0), mean)


@pytest.mark.parametrize("mean", [24, 96, 100])
@pytest.mark.parametrize("num_layers", [2, 8, 32])
def test_pyramidkvs_layers_are_the_papers_up_to_its_whole_steps(num_layers: int, mean: int) -> None:
    shape = Shape(620, 0, 8, 8, 2, 1, 7, mean + 8)
    prompt = random_prompt(shape, num_layers=num_layers)
    budgets = paper_pyramid_budgets(num_layers, mean, prompt.scored_len)
    counts = keep(method_for(shape, "pyramidkv"), prompt, shape.budget).counts - 8
    ours = counts[:, 0].tolist()
    assert max(abs(o - t) for o, t in zip(ours, budgets, strict=True)) <= num_layers
    assert sum(ours) == num_layers * mean <= sum(budgets)


def without_pooled_groups(shape: Shape) -> Shape:
    """Where the order of the group's mean and the pooling does not matter."""
    return shape if shape.pool_width == 1 else shape._replace(group=1)


def test_the_order_of_mean_and_pooling_matters_elsewhere() -> None:
    shape = Shape(60, 0, 4, 4, 2, 3, 7, 20)
    prompt = random_prompt(shape, num_layers=1)
    ours = method_for(shape, "snapkv").score(prompt)[0]
    theirs = paper_snapkv_scores(prompt, 0, 7)
    assert (ours >= theirs - 1e-7).all() and not torch.allclose(ours, theirs, rtol=1e-3)


def test_random_scores_are_well_defined_without_pooling() -> None:
    """So the comparisons above are not empty."""
    shape = Shape(200, 0, 8, 8, 2, 2, 1, 60)
    for seed in range(20):
        prompt = random_prompt(shape, seed, num_layers=1)
        assert well_defined(paper_lava_scores(prompt, 0, 1), 104)
        assert well_defined(paper_snapkv_scores(prompt, 0, 1), 104)
