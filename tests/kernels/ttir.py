# SPDX-License-Identifier: Apache-2.0
"""Reads a kernel's TTIR for address arithmetic that could wrap at 2**31."""

from __future__ import annotations

import re

_VALUE = re.compile(r"%[\w#:]+")
_ASSIGN = re.compile(r"^(?P<results>%[\w:]+(?:, %[\w:]+)*) = (?P<op>[\w.]+)(?P<rest>.*)$")
_STOPS = ("tt.load", "arith.cmpi", "arith.cmpf", "arith.constant")


def narrow_products(ttir: str) -> list[str]:
    """The 32-bit products of two run-time values that reach an address without a load between.

    A product with a compile-time constant (a block's first element) is allowed.
    """
    ops = _operations(ttir)
    found = []
    for name, (op, line) in ops.defined.items():
        is_narrow = op == "arith.muli" and re.search(r": (tensor<[\dx]+x)?i32>?", line)
        if is_narrow and not any(_is_constant(v, ops) for v in ops.inputs[name]):
            found.append((name, line))
    reached = _reaching_addresses(ops)
    return [line for name, line in found if name in reached]


class _operations:
    """Every value of the text: its op and line, and the values it is computed from."""

    def __init__(self, ttir: str):
        self.defined: dict[str, tuple[str, str]] = {}
        self.inputs: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        regions: list[list[str]] = []  # results of the enclosing scf op, or none
        for raw in ttir.splitlines():
            line = re.sub(r"\s*loc\(.*$", "", raw).strip()
            if line.startswith("}"):
                regions and regions.pop()
                if line.endswith("{"):  # } else {, } do {
                    regions.append(last)
                continue
            match = _ASSIGN.match(line)
            results = _names(match["results"]) if match else []
            if match:
                rest = match["rest"]
                for result in results:
                    self.defined[result] = (match["op"], line)
                    self.inputs[result] = _names(rest.split(" : ")[0])
                if match["op"] == "tt.addptr":
                    self.addresses.append(_names(rest)[1])
            if "scf.for" in line:
                self._bind_loop(line)
            elif line.startswith("scf.yield"):
                for result, value in zip(regions[-1], _names(line.split(" : ")[0]), strict=False):
                    self.inputs.setdefault(result, []).append(value)
            if line.endswith("{"):
                last = results
                regions.append(results)

    def _bind_loop(self, line: str) -> None:
        head = re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", line)
        assert head, line
        self.inputs[head[1]] = [head[2], head[4]]
        self.defined[head[1]] = ("scf.for", line)
        carried = re.search(r"iter_args\(([^)]*)\)", line)
        for name, start in re.findall(r"(%\w+) = (%[\w#]+)", carried[1] if carried else ""):
            self.inputs[name] = [start]
            self.defined[name] = ("scf.for", line)


def _names(text: str) -> list[str]:
    return [name.split("#")[0].split(":")[0] for name in _VALUE.findall(text)]


def _is_constant(name: str, ops: _operations) -> bool:
    op, _ = ops.defined.get(name, ("argument", ""))
    if op == "arith.constant":
        return True
    passes = op in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.trunci")
    return passes and _is_constant(ops.inputs[name][0], ops)


def _reaching_addresses(ops: _operations) -> set[str]:
    seen: set[str] = set()
    pending = list(ops.addresses)
    while pending:
        name = pending.pop()
        if name in seen or ops.defined.get(name, ("", ""))[0] in _STOPS:
            continue
        seen.add(name)
        pending += ops.inputs.get(name, [])
    return seen
