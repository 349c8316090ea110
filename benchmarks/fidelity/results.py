# SPDX-License-Identifier: Apache-2.0
"""A file of measurements, one JSON object a line, that a run adds to and a later run goes on with.

The first line holds the settings that the numbers depend on: a run with others is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FULL = "full"
"""The method name of a record for the whole prompt, exact."""


class ResultsError(ValueError):
    """The file belongs to another run."""


class Results:
    """Records with a unique key, the values of `key_fields`; in memory only if `path` is None."""

    def __init__(
        self,
        path: Path | None,
        key_fields: Sequence[str],
        settings: Mapping[str, Any],
        resume: bool = True,
    ):
        """resume: keep what the file holds; else start it anew. Raises ResultsError if it holds
        records of other settings."""
        self.path = path
        self.key_fields = tuple(key_fields)
        self._records: dict[tuple[Any, ...], Record] = {}
        header = {"settings": json.loads(json.dumps(settings))}
        if path is None:
            return
        if resume and path.exists() and path.stat().st_size:
            self._load(path, header)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def get(self, *key: Any) -> Record | None:
        """The record of a key, its values in the order of `key_fields`."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Keeps it and writes it through. Raises ResultsError if its key is there."""
        key = tuple(record[field] for field in self.key_fields)
        if key in self._records:
            raise ResultsError(f"{key}: recorded twice")
        self._records[key] = record
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _load(self, path: Path, header: Record) -> None:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run was cut off while it wrote its last line
            path.write_text(whole)
        found, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        if found != header:
            raise ResultsError(
                f"{path}: holds results of {found}, this run has {header}; "
                "name another file, or start it anew with --no-resume"
            )
        for record in lines:
            self._records[tuple(record[field] for field in self.key_fields)] = record
