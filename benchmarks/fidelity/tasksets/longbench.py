# SPDX-License-Identifier: Apache-2.0
"""The English tasks of LongBench: rows of a folder or the hub in the published prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from contexts import RAW_TASKS
from texts import load_rows

from tasksets import metrics
from tasksets.sample import Metric, Sample

SUITE = "longbench"
# The strings are LongBench's own, as data: scores are comparable only with the same ones.
PROMPTS = json.loads(Path(__file__).with_name("longbench_prompts.json").read_text())["tasks"]

METRICS: dict[str, Metric] = {
    "narrativeqa": metrics.qa_f1,
    "qasper": metrics.qa_f1,
    "multifieldqa_en": metrics.qa_f1,
    "hotpotqa": metrics.qa_f1,
    "2wikimqa": metrics.qa_f1,
    "musique": metrics.qa_f1,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "trec": metrics.first_line_classification,
    "triviaqa": metrics.first_line_f1,
    "samsum": metrics.first_line_rouge_l,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}


def samples(task: str, source: str | None, count: int) -> Iterator[Sample]:
    """The first `count` rows of a task, fewer if it has fewer. source: as `load_rows` takes it."""
    for row in load_rows(source, task)[:count]:
        prompt = PROMPTS[task]["prompt"]
        for field, text in (("{input}", row.question), ("{context}", row.context)):
            prompt = prompt.replace(field, text)
        yield Sample(
            name=row.id,
            task=task,
            suite=SUITE,
            prompt=prompt,
            answers=row.answers,
            max_new_tokens=PROMPTS[task]["max_new_tokens"],
            metric=METRICS[task],
            raw=task in RAW_TASKS,
            classes=row.classes,
        )
