# SPDX-License-Identifier: Apache-2.0
"""What we read of SGLang's objects is there, and the table names all of it."""

import ast
import pkgutil
from pathlib import Path

import pytest

import lava_sglang
from lava_sglang.integration.reads import READS
from lava_sglang.integration.seams import SEAMS
from tests.contract.test_seams import upstream_attributes

PACKAGE = Path(lava_sglang.__file__).parent
FOLDERS = ("managers", "mem_cache", "attention", "integration")

# What a variable of this name holds in our sources.
HOLDS = {
    "req": "srt.managers.schedule_batch.Req",
    "batch": "srt.managers.schedule_batch.ScheduleBatch",
    "scheduler": "srt.managers.scheduler.Scheduler",
    "tree_cache": "srt.mem_cache.base_prefix_cache.BasePrefixCache",
    "allocator": "srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator",
    "runner": "srt.model_executor.model_runner.ModelRunner",
    "forward_batch": "srt.model_executor.forward_batch_info.ForwardBatch",
    "layer": "srt.layers.radix_attention.RadixAttention",
    "kvc": "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator",
}
OURS = {
    "runner": {"kv_compression"},
    "scheduler": {"kv_compression_config", "add_log_parts"},
    "tree_cache": {"tree_core", "session_records"},  # of the unified tree, the one that is served
}


def own_names(of: str) -> set[str]:
    """What `LavaReq` adds to a request."""
    if of != "req":
        return OURS.get(of, set())
    from lava_sglang.managers.request import LavaReq

    return {name for name in vars(LavaReq) if not name.startswith("__")} | {
        *("compression", "compression_state", "layers", "page_size"),
    }


def attributes_of(variable: str) -> set[str]:
    """`a` of every `variable.a` or `self.variable.a` in our sources."""
    found = set()
    for folder in FOLDERS:
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    holder = node.value
                    name = holder.id if isinstance(holder, ast.Name) else None
                    if isinstance(holder, ast.Attribute):
                        inner = holder.value
                        name = holder.attr if getattr(inner, "id", None) == "self" else None
                    if name == variable:
                        found.add(node.attr)
    return found


@pytest.mark.parametrize("path", READS)
def test_what_we_read_is_there(path: str) -> None:
    cls = pkgutil.resolve_name(f"sglang.{path}")
    assert set(READS[path]) <= upstream_attributes(cls)


@pytest.mark.parametrize("variable", HOLDS)
def test_the_table_names_what_we_read(variable: str) -> None:
    called = {seam.target.rsplit(".", 1)[1] for seam in SEAMS}
    named = {*READS[HOLDS[variable]], *called, *own_names(variable)}
    assert attributes_of(variable) - named == set()
