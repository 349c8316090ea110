# SPDX-License-Identifier: Apache-2.0
"""One SGLang in this process: its CPU engine, published settings, the plugin installed.

At import, since test modules import SGLang at their top and it decides once on what it runs.
"""

import os
from collections.abc import Iterator

import pytest

from lava_sglang.cpu_platform import platform

os.environ[platform.CPU_ENGINE_ENV] = "1"
_notice = os.environ.get(platform._NOTICE_ENV)
PLATFORM_CLASS = platform.activate()
if _notice is None:
    os.environ.pop(platform._NOTICE_ENV, None)  # a server started by another test says it again


@pytest.fixture(scope="session")
def plugin_installed() -> None:
    """`LavaServerArgs` stands in SGLang's place, as after its own plugin loader."""
    from lava_sglang.integration import plugin

    plugin.install()


@pytest.fixture(scope="session")
def runtime_context(plugin_installed: None) -> Iterator[None]:
    """What a scheduler process publishes before it builds requests and pools."""
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context

    from lava_sglang.integration.args import LavaServerArgs

    publish(
        LavaServerArgs(model_path="dummy", device="cpu", attention_backend="torch_native"),
        role="test",
        ranks=SpawnRanks(world_rank=0, dp_rank=None),
    )
    yield
    reset_context()
