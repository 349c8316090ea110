# SPDX-License-Identifier: Apache-2.0
"""The installed SGLang has every place we touch, and `seams.py` lists what we override and hook."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang.srt.managers.schedule_batch as schedule_batch
import sglang.srt.managers.scheduler as scheduler_module
import sglang.srt.mem_cache.common as mem_cache_common
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from lava_sglang.integration import plugin, refusals, seams
from lava_sglang.integration.scheduler import LavaScheduler
from lava_sglang.managers.request import LavaReq

PACKAGE = Path(plugin.__file__).parents[1]
TARGETS = {seam.target for seam in seams.SEAMS}
# What hands a hook to SGLang.
HOOKING = (plugin,)
# Modules with classes that stand in for, or extend, SGLang's in a server process.
EXTENDING = [
    "integration.args",
    "integration.scheduler",
    "attention.flashinfer",
    "attention.backends",
    "mem_cache.pool",
    *(f"managers.{path.stem}" for path in sorted((PACKAGE / "managers").glob("[a-z]*.py"))),
]


def test_the_installed_sglang_has_every_seam() -> None:
    assert refusals.seam_reasons() == []
    assert refusals.version_reasons() == []


def test_the_seams_hold_also_where_our_classes_stand(
    plugin_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "Scheduler", LavaScheduler)
    assert refusals.seam_reasons() == []


def test_every_seam_says_how_and_why() -> None:
    assert len(TARGETS) == len(seams.SEAMS)
    for seam in seams.SEAMS:
        assert seam.how in ("replace", "hook", "override", "call") and seam.why


def test_a_changed_signature_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def evict_from_tree_cache(tree_cache: Any, tokens: int, *, force: bool) -> None: ...

    monkeypatch.setattr(mem_cache_common, "evict_from_tree_cache", evict_from_tree_cache)
    (reason,) = refusals.seam_reasons()
    assert reason == (
        "sglang.srt.mem_cache.common.evict_from_tree_cache takes ('tree_cache', 'tokens', "
        "'force'): expected ('tree_cache', 'num_tokens')"
    )


def test_a_changed_method_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Req, "reset_for_retract", lambda self, reason: None)
    (reason,) = refusals.seam_reasons()
    assert "schedule_batch.Req.reset_for_retract takes ('self', 'reason')" in reason


def test_what_is_gone_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(schedule_batch.Req, "_compute_max_prefix_len")
    monkeypatch.delattr(mem_cache_common, "checkpoint_kv_cache")
    found = refusals.seam_reasons()
    assert len(found) == 2
    assert all(" is missing: " in reason for reason in found)
    assert "Req._compute_max_prefix_len" in found[0] and "checkpoint_kv_cache" in found[1]


def test_a_module_that_is_gone_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = seams.Seam("srt.mem_cache.elsewhere.f", "call", (), "a test")
    monkeypatch.setattr(refusals, "SEAMS", (gone,))
    (reason,) = refusals.seam_reasons()
    assert reason.startswith("sglang.srt.mem_cache.elsewhere.f is missing: ")


def overrides() -> Iterator[tuple[type, type, str]]:
    """(our class, SGLang's class, method) of everything we override."""
    for name in EXTENDING:
        module = importlib.import_module(f"lava_sglang.{name}")
        for ours in vars(module).values():
            if not inspect.isclass(ours) or ours.__module__ != module.__name__:
                continue
            theirs = next((b for b in ours.__mro__ if b.__module__.startswith("sglang.")), None)
            if theirs is None:
                continue
            for method, value in vars(ours).items():
                if inspect.isfunction(value) and method not in ("__init__", "__new__"):
                    for base in theirs.__mro__:
                        if method in vars(base) and base is not object:
                            yield ours, theirs, method
                            break


def test_overrides_are_found() -> None:
    found = {f"{ours.__name__}.{method}" for ours, _, method in overrides()}
    assert {"LavaScheduler.run_batch", "LavaReq._compute_max_prefix_len"} <= found
    assert {theirs.__name__ for _, theirs, _ in overrides()} >= {
        "Scheduler",
        "Req",
        "PrefillAdder",
        "SchedulerOutputStreamer",
    }


def test_every_override_is_a_seam() -> None:
    missing = [
        f"{ours.__module__}.{ours.__name__}.{method} overrides {theirs.__module__}."
        f"{theirs.__name__}.{method}"
        for ours, theirs, method in overrides()
        if not any(target.endswith(f".{theirs.__name__}.{method}") for target in TARGETS)
    ]
    assert missing == []


def test_every_override_passes_what_its_base_takes() -> None:
    """Same parameter names, and maybe any keyword besides; or `*args, **kwargs`."""
    for ours, theirs, method in overrides():
        mine = inspect.signature(getattr(ours, method)).parameters
        base = inspect.signature(getattr(theirs, method)).parameters
        open_ended = {p.kind for p in mine.values()} >= {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        }
        named = [p.name for p in mine.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
        assert open_ended or list(base) in (named, list(mine)), (ours, method)


def test_the_attention_method_we_override_is_a_seam() -> None:
    """The subclass in `attention/query_capture.py` is made at run time, from a backend's class."""
    assert any(target.endswith(".AttentionBackend.forward_extend") for target in TARGETS)


def hooked_targets() -> list[str]:
    """The source of every target that we hand to SGLang's hook registry."""
    calls = [
        node
        for module in HOOKING
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hooks.add"
    ]
    return [ast.unparse(call.args[0]) for call in calls]


def test_hooks_are_only_added_where_this_test_looks() -> None:
    adding = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bhooks\.add\(|HookRegistry\.register\(", path.read_text())
    }
    assert {str(path) for path in adding} == {
        "integration/hooks.py",
        "integration/plugin.py",
    }


def test_every_hook_is_a_seam() -> None:
    """`f"sglang.{seams.NAME.target}"` for a hook; a class put in another's place by its path."""
    hooked = {seams.VALIDATE, seams.BACKEND}  # resolution hooks: SGLang has a registry for them
    for source in hooked_targets():
        name = re.fullmatch(r"f'sglang\.\{seams\.(\w+)\.target\}'", source)
        if name is not None:
            hooked.add(getattr(seams, name[1]))
        else:
            path = ast.literal_eval(source).removeprefix("sglang.")
            assert any(f"{target}.".startswith(f"{path}.") for target in TARGETS), path
    assert hooked == {seam for seam in seams.SEAMS if seam.how == "hook"}


def test_extension_points_that_are_not_methods() -> None:
    """What we set, read or name without calling it."""
    assert SchedulerOutputStreamer.has_additional_customized_info is False
    assert vars(SchedulerOutputStreamer)["__slots__"] is not None
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    forward = inspect.getsource(HybridAttnBackend.forward)
    assert "_select_backend" in forward and "backend.forward(" in forward
    assert "self.prefill_backend" in inspect.getsource(HybridAttnBackend)


def self_attributes(cls: type) -> set[str]:
    """Names that a class's own source stores on `self`, or defines in its body."""
    stored = set(vars(cls)) | set(inspect.get_annotations(cls))
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            stored.add(node.attr)
    return {name for name in stored if not name.startswith("__")}


def upstream_attributes(cls: type) -> set[str]:
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
    return set().union(*(self_attributes(base) for base in bases))


@pytest.mark.parametrize(
    ("ours", "on_purpose"), [(LavaReq, {"skip_radix_cache_insert"}), (LavaScheduler, set())]
)
def test_our_attributes_do_not_collide_with_sglangs(ours: type, on_purpose: set[str]) -> None:
    theirs = upstream_attributes(ours)
    assert len(theirs) > 100
    overridden = {method for cls, _, method in overrides() if cls is ours}
    assert (self_attributes(ours) & theirs) - overridden == on_purpose


def test_no_code_of_sglang_sets_our_attributes_from_outside() -> None:
    """`req.plan = ...` in a scheduler mixin would not show in the class itself."""
    own = sorted(self_attributes(LavaReq) - upstream_attributes(LavaReq))
    assert {"plan", "window", "compressed", "compression", "page_size"} <= set(own)
    touch = re.compile(rf"\b(?:req|r|request)\.(?:{'|'.join(own)})\b\s*(?:=[^=]|[-+|]=)")
    root = Path(inspect.getfile(schedule_batch)).parents[1]
    found = [
        f"{path.relative_to(root)}: {match.group()}"
        for folder in ("managers", "mem_cache", "disaggregation", "speculative", "beam_search")
        for path in (root / folder).rglob("*.py")
        for match in touch.finditer(path.read_text(encoding="utf-8-sig"))
    ]
    assert found == []
