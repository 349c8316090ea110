# SPDX-License-Identifier: Apache-2.0
"""One needle, in process: what each choice of entries makes of its answer, by teacher forcing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attention_inputs import AttentionInputs
from continuation import Columns, continuations, mean_kept
from haystack import Needle
from needle_summary import AFTER, FULL, INSIDE
from peers import recorded
from results import Record, Results
from torch import Tensor
from variants import Contender, Wanted

from lava_sglang.tools.inspection.prefill import Prefill, prefill

Pairs = Sequence[tuple[Contender, float]]


class Trial:
    """Its exact prefill, and the records that come of it."""

    def __init__(self, model: Any, needle: Needle, results: Results):
        self.model = model
        self.needle = needle
        self.results = results

    def run(self, missing: Mapping[str, Pairs], batch_tokens: int) -> None:
        """Adds a record for each (contender, budget) of each question, and of the full prompt."""
        needle = self.needle
        contenders = [contender for pairs in missing.values() for contender, _ in pairs]
        window_size = max(contender.window_size for contender in contenders)
        asked = needle.answer_start - needle.question_start
        # The queries of both windows: of the text's last tokens, and of the question's.
        with recorded(self.model, contenders) as inputs:
            prompt = needle.tokens[: needle.answer_start]
            exact = prefill(self.model, prompt, asked + window_size)
        if missing.get(INSIDE):
            self._ask(INSIDE, exact, inputs, missing[INSIDE], batch_tokens)
        if missing.get(AFTER):
            history = exact.without_last(asked)
            self._ask(AFTER, history, inputs, missing[AFTER], batch_tokens)

    def _ask(
        self,
        question: str,
        exact: Prefill,
        inputs: AttentionInputs | None,
        pairs: Pairs,
        batch_tokens: int,
    ) -> None:
        needle, results = self.needle, self.results
        fed = needle.tokens[exact.prompt_len : -1]
        wanted = Wanted(pairs, exact.prompt_len)
        choices: dict[tuple[str, int], Columns | None] = {**wanted.choices(exact, inputs)}
        if results.get(needle.name, question, FULL, None) is None:
            choices[FULL, exact.prompt_len] = None
        for (label, size), row in continuations(self.model, exact, fed, choices, batch_tokens):
            values = score_answer(row, needle.tokens[needle.answer_start :])
            kept = mean_kept(choices[label, size], exact.prompt_len)
            budgets = [None] if label == FULL else wanted.budgets(label, size)
            for budget in budgets:
                results.add(needle_record(needle, question, label, budget, kept, values))


def score_answer(logits: Tensor, answer: Sequence[int]) -> Record:
    """How well `logits` [T, vocabulary] end with the answer, all of it but its first token.

    With the question inside the prompt the first token comes from the exact prefill, on a server
    too, and says nothing of what was kept. Returns exact_match, 1 if each of the others is the most
    likely, and nll, their mean in nats.
    """
    expected = torch.tensor(answer[1:], device=logits.device)
    logits = logits[-len(expected) :]
    likelihoods = logits.float().log_softmax(dim=1).gather(1, expected[:, None])
    return {
        "exact_match": float((logits.argmax(dim=1) == expected).all()),
        "nll": -float(likelihoods.mean()),
    }


def needle_record(
    needle: Needle,
    question: str,
    method: str,
    budget: float | None,
    kept_tokens: float,
    values: Record,
) -> Record:
    return {
        "needle": needle.name,
        "kind": needle.kind,
        "length": needle.length,
        "depth": round(needle.depth, 4),
        "distractors": needle.distractors,
        "answer_tokens": needle.answer_tokens,
        "question": question,
        "method": method,
        "budget": budget,
        "kept_tokens": kept_tokens,
        **values,
    }
