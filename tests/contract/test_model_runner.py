# SPDX-License-Identifier: Apache-2.0
"""What we read off SGLang's ModelRunner is there, and our decode backend takes its rank's heads."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_parallel

import lava_sglang
from lava_sglang.attention.backends import LavaAttnBackend

PACKAGE = Path(lava_sglang.__file__).parent
MODULES = [*(PACKAGE / "attention").glob("*.py"), *(PACKAGE / "managers").glob("*.py")]
MODULES += [PACKAGE / "integration" / "refusals.py"]


def attributes(source: str, name: str, context: type[ast.expr_context]) -> set[str]:
    """`a` of every `name.a` that is read or stored."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        and isinstance(node.ctx, context)
    }


def test_every_attribute_that_we_read_is_one_of_the_runners() -> None:
    stored = set(dir(ModelRunner))
    for cls in ModelRunner.__mro__[:-1]:
        stored |= attributes(inspect.getsource(inspect.getmodule(cls)), "self", ast.Store)
    read = {name for path in MODULES for name in attributes(path.read_text(), "runner", ast.Load)}
    assert {"token_to_kv_pool", "req_to_token_pool", "model_config", "device"} <= read
    # The tables of compressed requests are put there under a name that it does not use.
    assert read - {"kv_compression"} <= stored and "kv_compression" not in stored


@pytest.mark.parametrize(("tp_size", "heads"), [(1, (8, 4)), (2, (4, 2)), (8, (1, 1))])
def test_the_decode_backend_has_the_heads_of_one_rank(
    runtime_context: None, monkeypatch: pytest.MonkeyPatch, tp_size: int, heads: tuple[int, int]
) -> None:
    """More ranks than KV heads: each has one."""
    monkeypatch.setattr(type(get_parallel()), "attn_tp_size", tp_size)
    config: Any = SimpleNamespace(
        num_attention_heads=8,
        head_dim=64,
        get_num_kv_heads=lambda tp: ModelConfig.get_num_kv_heads(whole, tp),
    )
    whole: Any = SimpleNamespace(get_total_num_kv_heads=lambda: 4, is_draft_model=False)
    rows = SimpleNamespace(req_to_token=None, size=3)
    runner = SimpleNamespace(
        req_to_token_pool=rows, token_to_kv_pool=None, model_config=config, device="cpu"
    )
    workspace = LavaAttnBackend(runner).workspace
    assert (workspace.num_qo_heads, workspace.num_kv_heads) == heads
