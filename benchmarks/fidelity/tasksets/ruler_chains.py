# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: a chain of assignments hidden in noise (NVIDIA/RULER)."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from tasksets.metrics import all_in_text
from tasksets.recipe import Recipe, inserted
from tasksets.ruler_needles import NOISE, SUITE
from tasksets.sample import Sample

TASK = "vt"
HOPS = 4
MAX_NEW_TOKENS = 30
EXAMPLE_NOISE = 5
"""Lines of noise in the solved example that stands before the question."""


def recipe(name: str) -> Recipe:
    """The sample's; the filler is lines of noise."""

    def make(random: Random, amount: int) -> Sample:
        example, start, variables = _question(random, EXAMPLE_NOISE)
        solved = f"{example}{start}{' '.join(variables)}\n\n"
        prompt, start, variables = _question(random, amount)
        answers = tuple(variables)
        return Sample(
            name,
            TASK,
            SUITE,
            solved + prompt,
            answers,
            MAX_NEW_TOKENS,
            all_in_text,
            reply_start=start.strip(),
        )

    return make


def _question(random: Random, noise: int) -> tuple[str, str, list[str]]:
    """The message, the beginning of the reply, and the variables."""
    variables: list[str] = []
    while len(variables) <= HOPS:
        variable = "".join(random.choices(ascii_uppercase, k=5))
        if variable not in variables:
            variables.append(variable)
    value = random.randint(10000, 99999)
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {variables[hop + 1]} = VAR {variables[hop]}" for hop in range(HOPS)]
    places = sorted(random.random() for _ in chain)
    lines = inserted([NOISE] * noise, chain, [round(place * noise) for place in places])
    text = "\n".join(lines)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above."
    )
    start = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are: "
    )
    return prompt, start, variables
