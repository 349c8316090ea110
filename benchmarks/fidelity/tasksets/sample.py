# SPDX-License-Identifier: Apache-2.0
"""One question of a benchmark, before and after it is cut to fit the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Metric = Callable[[str, "Sample"], float]
"""The score of a prediction, 0 to 1."""


class Sample(NamedTuple):
    """A prompt and what is right. `task` is the name in tables, with its length if it has one."""

    name: str  # unique in its task, the same for the same seed
    task: str
    suite: str
    prompt: str  # the user's message, or the whole text if `raw`
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: Metric
    raw: bool = False  # asked without a chat format
    reply_start: str = ""  # how the reply begins, given to the model
    classes: tuple[str, ...] = ()  # of a classification

    def score(self, prediction: str) -> float:
        return self.metric(prediction, self)


class Fitter:
    """Counts the tokens of samples in the model's format, and cuts the middle of long ones.

    tokenizer: of transformers. max_length: prompt and reply together, tokens. template_options:
    variables of its chat template, those that the server gets.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, template_options: Mapping[str, Any] | None = None
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template_options = dict(template_options or {})

    def as_asked(self, sample: Sample) -> Sample:
        """Without a chat format if the model has none, and no longer than fits."""
        if not self.tokenizer.chat_template:
            sample = sample._replace(raw=True)
        most = self.max_length - sample.max_new_tokens - self._around(sample)
        if most < 1:
            raise ValueError(
                f"--max-length={self.max_length}: {sample.task} needs more than "
                f"{self.max_length - most} for the reply and the chat format"
            )
        return sample._replace(prompt=self.cut(sample.prompt, most))

    def cut(self, text: str, most: int) -> str:
        """`text` in at most `most` tokens: as LongBench does, its two halves without the middle."""
        tokens = self.encode(text)
        size = len(tokens)
        over = size - most
        while over > 0:
            size -= over
            head = size // 2
            text = self.tokenizer.decode(tokens[:head], skip_special_tokens=True)
            tail = tokens[len(tokens) - (size - head) :]
            text += self.tokenizer.decode(tail, skip_special_tokens=True)
            over = len(self.encode(text)) - most  # need not be the tokens it was made of
        return text

    def count(self, sample: Sample) -> int:
        """Prompt tokens, the beginning of the reply included."""
        return len(self.encode(sample.prompt)) + self._around(sample)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _around(self, sample: Sample) -> int:
        """Tokens of the prompt that are not the user's message."""
        around = len(self.encode(sample.reply_start))
        if sample.raw or not self.tokenizer.chat_template:
            return around + len(self.tokenizer.encode(""))
        empty = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            **self.template_options,
        )
        return around + len(self.encode(empty))
