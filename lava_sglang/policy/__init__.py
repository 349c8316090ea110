# SPDX-License-Identifier: Apache-2.0
"""Which entries of a prompt to keep. Tensors in, tensors out; knows nothing of a server."""

from lava_sglang.policy.adakv import AdaKV
from lava_sglang.policy.base import (
    Method,
    PromptView,
    choose,
    keep,
    keep_again,
    keep_fewer,
    kept_places,
    rank,
    tape_scores,
)
from lava_sglang.policy.lava import LAVa
from lava_sglang.policy.lava_span import LAVaSpan
from lava_sglang.policy.pyramidkv import PyramidKV
from lava_sglang.policy.random import Random
from lava_sglang.policy.snapkv import SnapKV
from lava_sglang.policy.streamingllm import StreamingLLM

METHODS: dict[str, type[Method]] = {
    "lava": LAVa,
    "lava_span": LAVaSpan,
    "snapkv": SnapKV,
    "adakv": AdaKV,
    "pyramidkv": PyramidKV,
    "streamingllm": StreamingLLM,
    "random": Random,
}
"""The one place where a method registers; `lava_sglang.methods` names the same."""

__all__ = [
    "METHODS",
    "Method",
    "PromptView",
    "choose",
    "keep",
    "keep_again",
    "keep_fewer",
    "kept_places",
    "rank",
    "tape_scores",
]
