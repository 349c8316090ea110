# SPDX-License-Identifier: Apache-2.0
"""Tests that launch Triton kernels: in its interpreter, or on a GPU.

In the interpreter 32-bit overflow is an error. TRITON_INTERPRET must be set before triton is
imported, so `test_interpreted.py` runs these files in processes of their own; a plain pytest run
collects nothing here.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.device import ON_GPU

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
elif not ON_GPU:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield
