# SPDX-License-Identifier: Apache-2.0
"""One SGLang in this process: its CPU engine, published settings, the plugin installed.

At import, since test modules import SGLang at their top and it decides once on what it runs.
"""

import json
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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's description, which is all that resolving the arguments reads."""
    directory = tmp_path_factory.mktemp("model")
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(description))
    return str(directory)
