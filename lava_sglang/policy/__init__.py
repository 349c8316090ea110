# SPDX-License-Identifier: Apache-2.0
"""Which entries of a prompt to keep. Tensors in, tensors out; knows nothing of a server.

README.md has the equations, and which function is which step.
"""

from lava_sglang.policy.method import Method, load_methods, method_of
from lava_sglang.policy.prompt import PromptView
from lava_sglang.policy.score import PromptScores, score_prompt
from lava_sglang.policy.select import keep, select_entries, tape_entries, tape_scores
from lava_sglang.policy.split import Split, split_budget
from lava_sglang.policy.tail import select_again
from lava_sglang.policy.trim import Trim, select_fewer

__all__ = [
    "Method",
    "PromptScores",
    "PromptView",
    "Split",
    "Trim",
    "keep",
    "load_methods",
    "method_of",
    "score_prompt",
    "select_again",
    "select_entries",
    "select_fewer",
    "split_budget",
    "tape_entries",
    "tape_scores",
]
