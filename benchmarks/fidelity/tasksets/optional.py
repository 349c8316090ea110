# SPDX-License-Identifier: Apache-2.0
"""Packages that only some tasks need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str) -> Any:
    """The module. Raises ImportError that says how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} is needed: pip install 'lava-sglang[fidelity]'") from error
