# SPDX-License-Identifier: Apache-2.0
"""Long real prompts: passages of real texts with a question, cut to an exact number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

QUESTION = "In one or two sentences, what does this text explain?"

# Long chapters of the Python Language Reference, which every Python holds for its help(). The
# other long ones repeat parts of these.
_TOPICS = (
    "compound",
    "specialnames",
    "types",
    "formatstrings",
    "string-methods",
    "typesseq",
    "debugger",
    "typesmapping",
    "assignment",
    "comparisons",
    "execmodel",
    "strings",
    "import",
)
_PLACE = "{passage}"


class PassageError(ValueError):
    """There is not enough text for the prompts."""


class Prompt(NamedTuple):
    """A passage and a question about it, in the model's chat format."""

    title: str
    input_ids: list[int]


def python_topics() -> dict[str, str]:
    """Title -> text: chapters about Python, from the standard library."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in _TOPICS if name in topics}


def text_files(folder: Path) -> dict[str, str]:
    """Title -> text: the .txt files of `folder`. Raises PassageError if there is none."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    if not texts:
        raise PassageError(f"{folder}: holds no .txt file")
    return texts


def long_prompts(
    tokenizer: Any, texts: Mapping[str, str], count: int, num_tokens: int
) -> list[Prompt]:
    """`count` prompts of exactly `num_tokens` tokens, no two with the same passage.

    tokenizer: of transformers. The first passages of all texts come first, then the second ones.
    Raises PassageError if the texts are too short.
    """
    if count < 1:
        raise PassageError(f"--requests={count}: accepts a whole number from 1 up")
    before, after = _around_passage(tokenizer)
    size = num_tokens - len(before) - len(after)
    if size < 1:
        least = len(before) + len(after) + 1
        raise PassageError(f"--prompt-tokens={num_tokens}: accepts a whole number from {least} up")
    prompts = [
        Prompt(title, before + passage + after)
        for title, passage in passages(tokenizer, texts, size)
    ]
    if len(prompts) < count:
        raise PassageError(
            f"--requests={count}: accepts a whole number up to {len(prompts)}, which is how many "
            f"passages of {size} tokens the texts hold"
        )
    return prompts[:count]


def passages(
    tokenizer: Any, texts: Mapping[str, str], size: int
) -> Iterator[tuple[str, list[int]]]:
    """Title and token ids: all passages of `size` tokens, the first ones of all texts first."""
    tokens = {title: _encode(tokenizer, text) for title, text in texts.items()}
    longest = max(len(ids) for ids in tokens.values())
    for start in range(0, longest - size + 1, size):
        for title, ids in tokens.items():
            if start + size <= len(ids):
                part = f" ({start // size + 1})" if start else ""
                yield title + part, ids[start : start + size]


def _around_passage(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and after the passage."""
    content = f"{_PLACE}\n\n{QUESTION}"
    if not tokenizer.chat_template:
        first_ids: list[int] = tokenizer.encode("")  # the begin-of-text token, where there is one
        return first_ids, _encode(tokenizer, f"\n\n{QUESTION}\n")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = chat.split(_PLACE)
    return _encode(tokenizer, before), _encode(tokenizer, after)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: a whole text is longer than the model's context, which a passage is not.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids
