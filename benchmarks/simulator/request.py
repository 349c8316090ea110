# SPDX-License-Identifier: Apache-2.0
"""A request of the simulation: the scheduler's own class, with counts in place of tokens."""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.sampling_params import SamplingParams

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.request import LavaReq
from simulator.trace import Arrival


class StepClock:
    """Decode steps so far."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class Outputs:
    """The output tokens of a request, as their number: one more each decode step it is part of."""

    __slots__ = ("before", "clock", "decoding", "joined")

    def __init__(self, clock: StepClock):
        self.clock = clock
        self.before = 0  # tokens when it joined
        self.joined = 0  # the step count then
        self.decoding = False

    def __len__(self) -> int:
        return self.before + (self.clock.steps - self.joined if self.decoding else 0)

    @property
    def steps(self) -> int:
        """Decode steps since it joined."""
        return self.clock.steps - self.joined if self.decoding else 0

    def join(self) -> None:
        self.joined, self.decoding = self.clock.steps, True

    def leave(self) -> None:
        self.before, self.decoding = len(self), False


class SimulatedReq(LavaReq):
    """`LavaReq` as `PrefillAdder` reads it. What SGLang does with its tokens is done in counts."""

    def __init__(
        self, number: int, arrival: Arrival, config: KVCompressionConfig, clock: StepClock
    ):
        sampling = SamplingParams(max_new_tokens=arrival.max_new_tokens)
        prompt: Any = range(arrival.prompt_tokens)
        super().__init__(str(number), "", prompt, sampling, config=config, page_size=1)
        self.number = number
        self.arrival = arrival
        self.outputs = Outputs(clock)
        self.output_ids: Any = self.outputs
        self.held = 0  # slots of its own, without those of its decode steps
        self.finish_step = -1
        self.first_token: float | None = None

    @property
    def group(self) -> tuple[str, int]:
        """The tree's key of what its prompt shares."""
        return ("group", self.arrival.group)

    @property
    def tail_len(self) -> int:
        """Slots of its decode steps."""
        return self.outputs.steps - self.answer_compressed

    @property
    def length(self) -> int:
        """Slots that a decode step reads of it."""
        return self.lock.depth + self.held + self.tail_len

    def released_slots(self, tree_cache: Any) -> int:
        plan = self.plan or self.expected_plan()
        if plan is None:
            return 0
        node, locks = (self.last_node, 0) if self.lock is None else (self.lock, 1)
        matched = self.prefix_len if self.lock is None else node.depth
        unlocked = sum(
            each.length
            for each in node.path()
            if each.depth > plan.shared_prefix_len and each.locks == locks
        )
        return plan.prompt_len - matched + unlocked

    def match_nothing(self, tree_cache: Any) -> None:
        self.last_node = tree_cache.root
        self.prefix_len = self.kv.cache_protected_len = 0

    def init_next_round_input(self, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
        """Match the prompt before its first chunk; before a later one, what was computed counts."""
        total = len(self.origin_input_ids) + len(self.outputs)
        self.full_untruncated_fill_ids: Any = range(total)
        if tree_cache is None:
            assert self.extend_end is not None
            self.prefix_len = self.extend_end
            return
        self.last_node = tree_cache.match(self.group, self.number)
        self.prefix_len = min(self.last_node.depth, self._compute_max_prefix_len(total))
        self.kv.cache_protected_len = self.prefix_len
