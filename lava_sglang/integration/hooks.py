# SPDX-License-Identifier: Apache-2.0
"""Registers hooks with SGLang and checks that each one took: SGLang logs a failure and goes on."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from lava_sglang.config import refuse
from lava_sglang.integration.refusals import seam_reasons, version_reasons

_registered: set[str] = set()


def add(target: str, hook: Any, hook_type: HookType = HookType.AFTER) -> bool:
    """Register `hook` on a dotted path; False if we already have one there."""
    if target in _registered:
        return False
    HookRegistry.register(target, hook, hook_type)
    _registered.add(target)
    return True


def apply(check_seams: bool = False) -> None:
    """Apply what is registered, now. Raises KVCompressionError with every hook that did not take.

    check_seams: also compare every place we touch with what we count on; imports them all.
    """
    HookRegistry.apply_hooks()
    refuse(version_reasons() + (seam_reasons() if check_seams else []) + reasons())


def reasons() -> list[str]:
    """One sentence for every hook of ours that SGLang did not apply."""
    return [
        f"hook on {target} was not applied: see SGLang's log above"
        for target in sorted(_registered - HookRegistry._patched)
    ]
