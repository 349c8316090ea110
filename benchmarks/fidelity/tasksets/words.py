# SPDX-License-Identifier: Apache-2.0
"""English words to make samples of: those of the wonderwords package, which RULER uses."""

from __future__ import annotations

from functools import cache

from tasksets.optional import needed


@cache
def words(kind: str) -> tuple[str, ...]:
    """Lower-case words of a kind, "noun", "adjective" or "verb", in order."""
    found = needed("wonderwords").RandomWord().filter(include_categories=[kind])
    return tuple(sorted({word for word in found if word.isalpha() and word.islower()}))
