# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lava_sglang.kernels.layer_split import (
    MAX_CAP,
    layer_entropy_triton,
    layer_split,
    layer_split_triton,
    pyramid_weights,
)
from lava_sglang.kernels.reference import layer_entropy_ref, layer_split_ref
from tests.kernels.device import generator


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_reference(seed: int) -> None:
    g = generator(seed)
    num_layers = int(torch.randint(1, 40, (1,), generator=g))
    cap = int(torch.randint(1, 60, (1,), generator=g))
    weights = torch.rand(num_layers, generator=g)
    if seed % 3 == 0:
        weights = (weights * 4).round() / 4  # ties and zeros
    total = int(torch.randint(0, num_layers * cap + 1, (1,), generator=g))
    got = layer_split_triton(weights, total, cap)
    assert got.tolist() == layer_split_ref(weights.tolist(), total, cap)


@pytest.mark.parametrize("weight", [0.0, 2.0**-31, 1e-6, 1.0, float("nan")])
def test_extreme_weights_at_full_size(weight: float) -> None:
    """Sums are exact at the largest cap, where products come near 2**62."""
    weights = torch.full((80,), 1.0)
    weights[::2] = weight
    for cap in (2**24, 2**25, MAX_CAP):  # the second: 32 heads of a million tokens
        for total in (1, 12_345_678, 80 * cap - 1):
            got = layer_split_triton(weights, total, cap)
            assert got.sum() == total and got.min() >= 0 and got.max() <= cap
            assert torch.equal(got, layer_split(weights, total, cap))


def test_real_size() -> None:
    weights = pyramid_weights(32, torch.get_default_device())
    total, cap = 32 * 8 * (4096 - 32), 8 * 16_352
    assert torch.equal(layer_split_triton(weights, total, cap), layer_split(weights, total, cap))


@pytest.mark.parametrize("shape", [(3, 2, 500), (2, 1, 1), (4, 3, 4096), (2, 5, 4097)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_entropy(shape: tuple[int, ...], scale: float) -> None:
    g = generator(0)
    scores = torch.rand(shape, generator=g) ** 8 * scale
    scores[0] = 0.0
    scores[-1, :, ::2] = 0.0
    got, want = layer_entropy_triton(scores), layer_entropy_ref(scores)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[0] == 0
