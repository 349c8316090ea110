# SPDX-License-Identifier: Apache-2.0
"""Server arguments that are resolved as a start resolves them."""

from typing import Any

import pytest

from lava_sglang.config import KVCompressionError
from lava_sglang.integration.args import LavaServerArgs


def start_reasons(model: str, **options: Any) -> list[str]:
    """Why a start with `options` is refused."""
    args = LavaServerArgs(model_path=model, device="cpu", **options)
    with pytest.raises(KVCompressionError) as caught:
        args.resolve_once()
    assert str(caught.value).startswith("KV compression cannot start:\n- ")
    return caught.value.reasons
