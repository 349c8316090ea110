# SPDX-License-Identifier: Apache-2.0
"""Reads a kernel's TTIR for address arithmetic that could wrap at 2**31."""

from __future__ import annotations

import re

_ASSIGN = re.compile(r"^(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_LOCATION = re.compile(r"\s*loc\([^()]*(?:\([^()]*\))?\)")
_LOOP = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to %[\w#]+ step (%[\w#]+)")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
_TABLES = ("tt.load", "arith.cmpi", "arith.cmpf", "arith.constant")
_SAME_VALUE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.trunci")


def narrow_products(ttir: str) -> list[str]:
    """The 32-bit products of two run-time values that reach an address without a load between.

    A product with a compile-time constant (a block's first element) is allowed.
    """
    values = _Values(ttir)
    of_addresses = values.of_addresses()
    return [
        line
        for name, line in values.line.items()
        if re.search(r" = arith\.muli .* : (tensor<[\dx]+x)?i32>?", line)
        and not any(values.is_constant(factor) for factor in values.inputs[name])
        and name in of_addresses
    ]


class _Values:
    """Every value of the text: its line, its op, and the values that it is computed from.

    The results of one op are one value here, which depends on all that the op yields.
    """

    def __init__(self, ttir: str):
        self.line: dict[str, str] = {}
        self.op: dict[str, str] = {}
        self.inputs: dict[str, list[str]] = {}
        self.offsets: list[str] = []  # what is added to pointers
        regions: list[str] = []  # the result of each enclosing op
        for raw in ttir.splitlines():
            if raw.startswith("#"):
                continue
            line = _LOCATION.sub("", raw).strip()
            result = ""
            if line.startswith("}"):
                result = regions.pop()  # } else {
            elif match := _ASSIGN.match(line):
                result, self.op[match[1]], rest = match.groups()
                self.line[result] = line
                self.inputs[result] = _names(rest)
                if self.op[result] == "tt.addptr":
                    self.offsets.append(_names(rest)[1])
            elif line.startswith(("scf.yield", "scf.condition")):
                self.inputs.setdefault(regions[-1], []).extend(_names(line))
            elif line.startswith("^"):
                self.inputs |= {name: [regions[-1]] for name in re.findall(r"(%\w+):", line)}
            self.inputs |= {name: [start, result] for name, start in _CARRIED.findall(line)}
            if loop := _LOOP.search(line):
                self.inputs[loop[1]] = [loop[2], loop[3]]
            if line.endswith("{"):
                regions.append(result)

    def is_constant(self, name: str) -> bool:
        op = self.op.get(name)
        return op == "arith.constant" or (
            op in _SAME_VALUE and self.is_constant(self.inputs[name][0])
        )

    def of_addresses(self) -> set[str]:
        """The values that an address is computed from, up to what was read from memory."""
        reached: set[str] = set()
        pending = list(self.offsets)
        while pending:
            name = pending.pop()
            if name not in reached and self.op.get(name) not in _TABLES:
                reached.add(name)
                pending += self.inputs.get(name, [])
        return reached


def _names(text: str) -> list[str]:
    """The values in a line before its types."""
    return re.findall(r"%\w+", text.split(" : ")[0])
