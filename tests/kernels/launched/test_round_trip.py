# SPDX-License-Identifier: Apache-2.0
import pytest

from lava_sglang.kernels.compact import compact_triton
from lava_sglang.kernels.layer_split import layer_entropy_triton, layer_split_triton
from lava_sglang.kernels.ragged_decode import ragged_decode_triton
from lava_sglang.kernels.select import select_triton
from lava_sglang.kernels.window_scores import window_scores_triton
from tests.kernels.round_trip import Ops, check_round_trip

TRITON = Ops(
    window_scores_triton,
    layer_entropy_triton,
    layer_split_triton,
    select_triton,
    compact_triton,
    ragged_decode_triton,
)


@pytest.mark.parametrize("head_floor", [0, 6])
def test_round_trip(head_floor: int) -> None:
    check_round_trip(TRITON, head_floor=head_floor)
