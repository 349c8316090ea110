# SPDX-License-Identifier: Apache-2.0
"""How the published evaluations score a prediction, from 0 to 1.

Sources: LongBench (metrics.py and eval.py of THUDM/LongBench), RULER (NVIDIA/RULER), InfiniteBench
(compute_scores.py of OpenBMB/InfiniteBench).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from tasksets.optional import needed
from tasksets.sample import Metric, Sample

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def _best(score: Callable[[str, str], float]) -> Metric:
    """The highest score over the sample's answers."""
    return lambda prediction, sample: max(score(prediction, answer) for answer in sample.answers)


def _first_line(metric: Metric) -> Metric:
    """Few-shot models go on with examples of their own."""
    return lambda prediction, sample: metric(prediction.lstrip("\n").partition("\n")[0], sample)


def _f1(prediction: str, answer: str) -> float:
    found, wanted = _words(prediction), _words(answer)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _rouge_l(prediction: str, answer: str) -> float:
    rouge = needed("rouge").Rouge(metrics=["rouge-l"])
    if not prediction.replace(".", " ").split():
        return 0.0  # which the package refuses
    return float(rouge.get_scores(prediction, answer)[0]["rouge-l"]["f"])


def _code_similarity(prediction: str, answer: str) -> float:
    """Of the first line that is code, in whole per cents."""
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return round(needed("rapidfuzz.fuzz").ratio(next(code, ""), answer)) / 100


def _share_of_numbers(prediction: str, answer: str) -> float:
    """Of the numbers in the prediction, those that are the answer's."""
    found = re.findall(r"\d+", prediction)
    wanted = re.findall(r"\d+", answer)[0]
    return found.count(wanted) / len(found) if found else 0.0


def classification(prediction: str, sample: Sample) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them."""

    def score(answer: str) -> float:
        named = [name for name in sample.classes if name in prediction]
        named = [name for name in named if name == answer or name not in answer]
        return 1 / len(named) if answer in named else 0.0

    return max(score(answer) for answer in sample.answers)


def all_in_text(prediction: str, sample: Sample) -> float:
    """RULER's string_match_all: the share of the answers that the prediction contains."""
    found = [answer.lower() in prediction.lower() for answer in sample.answers]
    return sum(found) / len(found)


def _first_number(prediction: str, answer: str) -> float:
    found = re.search(r"\d+", prediction)
    return float(found is not None and found.group() == answer)


def _is_a_word(prediction: str, answer: str) -> float:
    return float(answer in prediction.translate(_SEPARATORS).split())


qa_f1 = _best(_f1)
rouge_l = _best(_rouge_l)
code_similarity = _best(_code_similarity)
count = retrieval = _best(_share_of_numbers)
first_number = _best(_first_number)
word = _best(_is_a_word)
first_line_f1 = _first_line(qa_f1)
first_line_rouge_l = _first_line(rouge_l)
first_line_classification = _first_line(classification)
