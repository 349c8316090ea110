# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch

from lava_sglang.kernels import arena as arena_module
from lava_sglang.kernels import window_scores as module
from lava_sglang.kernels.layer_split import layer_entropy_triton, layer_split_triton
from lava_sglang.kernels.reference import (
    layer_entropy_ref,
    layer_split_ref,
    select_ref,
    window_scores_ref,
)
from lava_sglang.kernels.score_options import ScoreOptions
from lava_sglang.kernels.select import select_triton
from lava_sglang.kernels.window_scores import window_scores_triton
from tests.kernels.device import DTYPES, generator

RTOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}


def prompt(
    layers: int = 2,
    heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    prompt_len: int = 150,
    queries: int = 8,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(queries, arena, prompt_slots)"""
    g = generator(seed)
    slots = prompt_len + 20
    arena = torch.randn(layers, 2, slots, heads, head_dim, generator=g).to(dtype)
    q = torch.randn(layers, queries, heads * group, head_dim, generator=g).to(dtype)
    return 2 * q, arena, torch.randperm(slots, generator=g)[:prompt_len]


def check(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    prefix: int = 21,
    window: int = 8,
    **options: Any,
) -> None:
    options = dict(options)
    args = (*inputs, prefix, window, options.pop("scaling", inputs[0].shape[3] ** -0.5))
    if "recency" in options:
        places = torch.arange(inputs[0].shape[1], dtype=torch.float32)
        options["query_weights"] = (places / options.pop("recency")).softmax(0)
    further = {name: options.pop(name) for name in ("layers", "logit_cap") if name in options}
    scored = ScoreOptions(**options)
    got = window_scores_triton(*args, scored, **further)
    want = window_scores_ref(*args, scored, **further)
    assert want.shape[2] == len(inputs[2]) - prefix - window
    torch.testing.assert_close(got, want, rtol=RTOL[inputs[0].dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_reduce", ["max", "mean"])
@pytest.mark.parametrize("value_norm", ["token", "head", "none"])
@pytest.mark.parametrize("root_mean_square", [False, True])
def test_options(
    dtype: torch.dtype, group_reduce: str, value_norm: str, root_mean_square: bool
) -> None:
    check(
        prompt(dtype=dtype),
        group_reduce=group_reduce,
        value_norm=value_norm,
        root_mean_square=root_mean_square,
    )


@pytest.mark.parametrize("value_norm", ["token", "head", "none"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["key", "value", "query"])
def test_what_is_not_finite_scores_nothing(place: str, number: float, value_norm: str) -> None:
    """And the same entries are kept as by the reference: one bad number empties no layer."""
    inputs = prompt(layers=3, heads=2, group=2, dtype=torch.float32)
    queries, arena, slots = inputs
    at = int(slots[60])
    if place == "query":
        queries[1, 3, 2, 7] = number
    else:
        arena[1, 0 if place == "key" else 1, at, 0, 5] = number
    args = (*inputs, 21, 8, 0.125)
    options = ScoreOptions(value_norm=value_norm)
    got = window_scores_triton(*args, options)
    want = window_scores_ref(*args, options)
    assert got.isfinite().all() and want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)
    assert (got[[0, 2]] > 0).all() and (got[1, 1] > 0).any()
    if place == "value":
        others = [i for i in range(got.shape[2]) if abs(i - 39) > 3]
        assert (got[1, 0, others] > 0).all()  # of the 7 places around slots[60], at most
    budget, total = 30, 3 * 2 * (30 - 8)
    kept = select_triton(
        got, layer_split_triton(layer_entropy_triton(got), total, 2 * got.shape[2]), budget, 21, 8
    )
    counts = layer_split_ref(layer_entropy_ref(want).tolist(), total, 2 * got.shape[2])
    assert min(counts) > 0  # beside the window
    expected = select_ref(want, torch.tensor(counts), 21, 8)
    assert all(torch.equal(a, b.to(a)) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("root_mean_square", [False, True])
@pytest.mark.parametrize("recency", [0.5, 8, 1000])
def test_query_weights(recency: float, root_mean_square: bool) -> None:
    inputs = prompt(layers=1, queries=40, dtype=torch.float32)
    check(inputs, window=40, recency=recency, root_mean_square=root_mean_square)


@pytest.mark.parametrize("pool_width", [1, 3, 63])
def test_pool_width(pool_width: int) -> None:
    check(prompt(), pool_width=pool_width)


SPAN: dict[str, Any] = {
    "recency": 8,
    "root_mean_square": True,
    "pool_width": 1,
    "span": 12,
    "span_share": 0.3,
    "group_reduce": "mean",
    "value_norm": "token",
}
METHODS = pytest.mark.parametrize("options", [{}, SPAN], ids=["lava", "span"])


@pytest.mark.parametrize("pool_width", [1, 7])
@pytest.mark.parametrize(("span", "span_share"), [(1, 0.5), (12, 0.3), (60, 1.0)])
def test_span(span: int, span_share: float, pool_width: int) -> None:
    """Also past the first scored token, and past a block of them."""
    inputs = prompt(layers=1, heads=1, prompt_len=1100, dtype=torch.float32)
    check(inputs, **SPAN | {"span": span, "span_share": span_share, "pool_width": pool_width})


@METHODS
@pytest.mark.parametrize("group", [1, 3, 5, 7, 16])
def test_group(group: int, options: dict[str, Any]) -> None:
    check(prompt(layers=1, group=group), **options)


@METHODS
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_head_dim(head_dim: int, options: dict[str, Any]) -> None:
    check(prompt(layers=1, head_dim=head_dim, heads=3), **options)


@pytest.mark.parametrize(
    ("prompt_len", "prefix", "window", "queries"),
    [
        (10, 0, 9, 9),  # one scored token
        (150, 0, 32, 32),
        (150, 130, 8, 3),  # the prefix covers part of the window
        (129, 0, 1, 1),
        (300, 3, 100, 100),  # more rows than a block
        (257, 64, 64, 64),
    ],
)
@METHODS
def test_shape(
    prompt_len: int, prefix: int, window: int, queries: int, options: dict[str, Any]
) -> None:
    check(prompt(prompt_len=prompt_len, queries=queries), prefix, window, **options)


@METHODS
def test_a_scale_for_each_layer(options: dict[str, Any]) -> None:
    check(prompt(dtype=torch.float32), scaling=torch.tensor([0.05, 0.3]), **options)


@METHODS
@pytest.mark.parametrize("dtype", DTYPES)
def test_some_of_the_arenas_layers(dtype: torch.dtype, options: dict[str, Any]) -> None:
    queries, arena, slots = prompt(layers=5, dtype=dtype)
    layers, scaling = torch.tensor([1, 4]), torch.tensor([0.05, 0.3])
    inputs = (queries[:2], arena, slots)
    check(inputs, layers=layers, scaling=scaling, **options)
    alone = (queries[:2], arena[[1, 4]], slots, 21, 8, scaling, ScoreOptions(**_plain(options)))
    got = window_scores_triton(*inputs, *alone[3:], layers=layers)
    assert torch.equal(got, window_scores_triton(*alone))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "recency"}


@METHODS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit_cap", [0.5, 5.0, 50.0])
def test_logit_cap(logit_cap: float, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(prompt(dtype=dtype), logit_cap=logit_cap, **options)


@pytest.mark.parametrize("num_programs", [1, 4, 1024])
def test_prompt_split_over_programs(num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_PROGRAMS", num_programs)
    check(prompt(prompt_len=700, layers=1, heads=1, dtype=torch.float32))


@METHODS
def test_layers_in_turns(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(module, "SCRATCH_BYTES", 2 * 4 * 4 * 121)
    check(prompt(layers=5), **options)


@METHODS
@pytest.mark.parametrize("by_bits", [False, True])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(
    kv_dtype: torch.dtype,
    by_bits: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena_module, "_converts_e4m3fn", lambda: not by_bits)
    queries, arena, slots = prompt()
    check((queries, arena.to(kv_dtype), slots), **options)


@METHODS
def test_arena_past_32_bits(options: dict[str, Any]) -> None:
    queries, small, prompt_slots = prompt(head_dim=128)
    slots = 2**31 // (2 * 2 * 2 * 128) + 2**20
    arena = torch.empty(2, 2, slots, 2, 128, dtype=torch.float16)
    arena[:, :, -small.shape[2] :] = small
    assert arena.numel() > 2**31
    check((queries, arena, prompt_slots + slots - small.shape[2]), **options)


@pytest.mark.parametrize(
    "change",
    [
        {"pool_width": 4},
        {"group_reduce": "sum"},
        {"value_norm": "layer"},
        {"query_weights": torch.full((7,), 1 / 7)},
        {"span": -1},
        {"span_share": 0.0},
        {"span_share": 1.1},
        {"window": 7},
        {"prefix": 142},
    ],
)
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check(prompt(), **change)
