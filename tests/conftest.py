# SPDX-License-Identifier: Apache-2.0
"""How `make test` shares its two workers: the tests of servers on one, file by file the rest."""

from pathlib import Path

import pytest

E2E = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A server's tests run in their order and share what the session holds, such as the oracle."""
    for item in items:
        group = "e2e" if item.path.is_relative_to(E2E) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
