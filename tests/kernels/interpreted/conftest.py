# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels in its interpreter, with 32-bit overflow raised as an error.

TRITON_INTERPRET must be set before triton is imported, so `test_interpreted.py` runs these files
in processes of their own; a plain pytest run collects nothing here.
"""

import os

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
else:
    collect_ignore_glob.append("test_*.py")
