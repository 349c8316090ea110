# SPDX-License-Identifier: Apache-2.0
"""Which tasks there are, and the samples of those that were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from texts import load_books

from tasksets import infinitebench, longbench, ruler_chains, ruler_needles, ruler_words
from tasksets.recipe import Recipe, fill
from tasksets.sample import Fitter, Sample

RULER = (*ruler_needles.FORMS, ruler_chains.TASK, ruler_words.COMMON, ruler_words.FREQUENT)
SUITES: dict[str, tuple[str, ...]] = {
    longbench.SUITE: tuple(longbench.METRICS),
    ruler_needles.SUITE: RULER,
    infinitebench.SUITE: tuple(infinitebench.FORMS),
}


def task_names(asked: Iterable[str]) -> list[str]:
    """The tasks of names of tasks and suites, each once. Raises ValueError at an unknown one."""
    known = {task: (task,) for tasks in SUITES.values() for task in tasks} | SUITES
    found: dict[str, None] = {}
    for name in asked:
        if name not in known:
            raise ValueError(f"--tasks {name}: accepts {', '.join([*SUITES, *known])}")
        found |= dict.fromkeys(known[name])
    return list(found)


def samples(
    tasks: Iterable[str],
    source: str | None,
    lengths: Sequence[int],
    count: int,
    seed: int,
    fitter: Fitter,
) -> Iterator[Sample]:
    """`count` of each task, of one that is made up to a length of each length.

    source: as `--data` takes it. lengths: tokens of prompt and reply.
    """
    for task in tasks:
        if task in SUITES[longbench.SUITE]:
            for sample in longbench.samples(task, source, count):
                yield fitter.as_asked(sample)
        elif task in SUITES[infinitebench.SUITE] and (
            read := list(infinitebench.rows(task, _folder(source), count))
        ):
            for sample in read:
                yield fitter.as_asked(sample)
        else:
            for length in lengths:
                yield from _made_up(task, source, length, count, seed, fitter)


def _made_up(
    task: str, source: str | None, length: int, count: int, seed: int, fitter: Fitter
) -> Iterator[Sample]:
    if length > fitter.max_length:
        raise ValueError(
            f"--lengths: {length}: accepts up to --max-length={fitter.max_length} tokens"
        )
    for number in range(count):
        recipe = _recipe(task, f"{seed}/{number}", source, length)
        made = fill(recipe, f"{seed}/{task}/{length}/{number}", length, fitter)
        yield fitter.as_asked(made._replace(task=f"{task}@{length}"))


def _recipe(task: str, name: str, source: str | None, length: int) -> Recipe:
    if task in ruler_needles.FORMS:
        return ruler_needles.recipe(task, name, load_books(source))
    if task == ruler_chains.TASK:
        return ruler_chains.recipe(name)
    if task == ruler_words.COMMON:
        return ruler_words.common_recipe(name, length)
    if task == ruler_words.FREQUENT:
        return ruler_words.frequent_recipe(name, length)
    return infinitebench.recipe(task, name)


def _folder(source: str | None) -> Path | None:
    return None if source in (None, "hub") else Path(str(source))
