# SPDX-License-Identifier: Apache-2.0
"""Real prose of any length that every Python has: the language reference in `pydoc_data`."""

from pydoc_data.topics import topics
from typing import Any


def prose_tokens(tokenizer: Any) -> list[int]:
    """All help topics as one list of token ids, about 120,000."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return list(tokenizer.encode(text, add_special_tokens=False))


def cut(tokens: list[int], lengths: list[int], start: int = 0) -> list[list[int]]:
    """Prompts of these lengths, one after the other: no two share a prefix."""
    prompts = []
    for length in lengths:
        prompts.append(tokens[start : start + length])
        start += length
    assert start <= len(tokens)
    return prompts
