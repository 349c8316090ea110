# SPDX-License-Identifier: Apache-2.0
"""AdaKV: SnapKV's scores, compared across the heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lava_sglang.policy.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """A layer keeps its best entries whichever head they are in; every head at least a fifth of
    the mean. Source: arXiv 2407.11550."""

    head_floor: ClassVar[float] = 0.2
