# SPDX-License-Identifier: Apache-2.0
"""What a scheduler process of SGLang publishes before it admits: settings, the plugin in place."""

from __future__ import annotations

from functools import cache


@cache
def publish_settings() -> None:
    """SGLang's defaults. Nothing is computed, so the device makes no difference."""
    from lava_sglang.integration import plugin

    plugin.install()
    from sglang.srt.runtime_context import SpawnRanks, publish

    from lava_sglang.integration.args import LavaServerArgs

    settings = LavaServerArgs(model_path="dummy", device="cpu", attention_backend="torch_native")
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None))
