# SPDX-License-Identifier: Apache-2.0
"""A new method is one file and one line: nothing else has to know its name."""

import re
import subprocess
import sys
from pathlib import Path

import lava_sglang.methods
import lava_sglang.policy
from lava_sglang.kernels import layer_split, reference
from lava_sglang.methods import METHODS

MINE = '''
from dataclasses import dataclass
from lava_sglang.policy.method import Method

@dataclass(frozen=True)
class LargestValues(Method):
    """The entries with the largest values."""

    def score(self, prompt):
        values = prompt.arena[:, 1, prompt.slots][:, prompt.shared_prefix_len :]
        return values.norm(dim=-1)[:, : prompt.scored_len].transpose(1, 2)
'''
LINE = """    "largest": MethodTraits(
        "mine:LargestValues", "the largest values", heads_compete=True, needs_queries=False
    ),
"""
USE = """
import sys, types
from pathlib import Path
source = Path(sys.argv[1]).read_text()
head, table = source.split("METHODS: dict[str, MethodTraits] = {\\n")
methods = types.ModuleType("lava_sglang.methods")
sys.modules["lava_sglang.methods"] = methods
exec(head + "METHODS: dict[str, MethodTraits] = {\\n" + sys.argv[2] + table, methods.__dict__)

import torch
from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import PromptView, keep, method_of

config = KVCompressionConfig.parse({"method": "largest", "window_size": 2, "head_floor": 0.0})
assert config.ragged and config.for_request({"method": "largest"}).method == "largest"
try:
    KVCompressionConfig.parse({"method": "largest", "window_size": 2, "decode_interval": 20})
except KVCompressionError as error:
    assert "largest" in str(error), error
else:
    raise AssertionError("it has no queries to score an answer by")
arena = torch.arange(2 * 2 * 8 * 2 * 4).float().view(2, 2, 8, 2, 4)
prompt = PromptView(arena, torch.arange(8), LayerMap.plain(2), None, None, 0, 2)
kept = keep(method_of(config), prompt, 4)
assert kept.tape_tokens.tolist() == [4, 5, 6, 7] * 4, kept
print("kept")
"""


def test_a_method_is_added_by_one_file_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    found = subprocess.run(
        [sys.executable, "-c", USE, lava_sglang.methods.__file__, LINE],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "kept", found.stderr


def test_the_page_of_the_algorithm_names_what_is_there() -> None:
    page = (Path(lava_sglang.policy.__file__).parent / "README.md").read_text()
    steps = re.findall(r"^## \d\. \w+: `(\w+)`$", page, re.MULTILINE)
    assert steps == ["score_prompt", "split_budget", "select_entries"]
    for name in (*steps, *re.findall(r"\*\*\w+, `(\w+)`", page)):
        assert callable(getattr(lava_sglang.policy, name))
    assert callable(reference.window_scores_ref) and callable(layer_split.layer_split)
    for method in METHODS:
        assert f"`{method}`" in page
    root = Path(__file__).parents[2]
    for path in re.findall(r"`((?:kernels|mem_cache|tests)/[\w/]+\.py)`", page):
        assert (root / path).is_file() or (root / "lava_sglang" / path).is_file(), path
