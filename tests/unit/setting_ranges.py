# SPDX-License-Identifier: Apache-2.0
"""What the answers to a bad value call its range, written out."""

BUDGET_RANGE = (
    "a fraction of the suffix in (0, 1], or a whole number of tokens above window_size; "
    "or a ladder of fractions or of numbers, each below the one before, such as 0.5,0.25,0.125"
)
HEAD_FLOOR_RANGE = (
    "a share from 0 to 1, with one of the methods lava, lava_span, adakv and without uniform_heads"
)
METHOD_RANGE = "one of lava, lava_span, adakv, pyramidkv, snapkv, streamingllm, random"
