# SPDX-License-Identifier: Apache-2.0
"""Which entries of a prompt to keep. Tensors in, tensors out; knows nothing of a server."""

from lava_sglang.policy.base import LayerView, Method, select
from lava_sglang.policy.random import Random
from lava_sglang.policy.snapkv import SnapKV
from lava_sglang.policy.streamingllm import StreamingLLM

METHODS: dict[str, type[Method]] = {
    "snapkv": SnapKV,
    "streamingllm": StreamingLLM,
    "random": Random,
}
"""The one place where a method registers; `config.UNIFORM_METHODS` names the same."""

__all__ = ["METHODS", "LayerView", "Method", "select"]
