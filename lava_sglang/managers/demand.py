# SPDX-License-Identifier: Apache-2.0
"""How many slots are free, and how many the requests that run and wait will want."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from lava_sglang.managers.request import LavaReq

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


class Demand:
    """A scheduler's memory in host numbers, of slots."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.tree_cache = scheduler.tree_cache

    def free_slots(self) -> int:
        """Free, or free once the tree evicts what nobody uses."""
        available: int = self.tree_cache.token_to_kv_pool_allocator.available_size()
        return available + int(self.tree_cache.evictable_size())

    def pool_slots(self) -> int:
        """What one request alone could have: all but what sessions hold between their turns."""
        size: int = self.tree_cache.token_to_kv_pool_allocator.size
        records = self.tree_cache.session_records().values()
        return size - sum(int(kv.kv_allocated_len) for kv in records)

    def running(self) -> list[LavaReq]:
        """Requests that decode."""
        reqs: list[LavaReq] = self.scheduler.running_batch.reqs
        return reqs

    def leaves_room(self, free: int, prefilled: Iterable[LavaReq]) -> bool:
        """Whether `free` slots are enough for the answers of what runs and for all that waits.

        prefilled: requests that are about to run. A waiting request counts with its smallest tape,
        and the longest of them with its prompt besides, which is there while it is prefilled.
        """
        ratio = self.scheduler.new_token_ratio_tracker.current
        for req in (*self.running(), *prefilled):
            if not req.finished():
                free -= _answer_slots(req, ratio)
        longest = 0
        half_prefilled = self.scheduler.chunked_req
        waiting = self.scheduler.waiting_queue
        for req in waiting if half_prefilled is None else (half_prefilled, *waiting):
            prompt_len, smallest = req.waiting_slots()
            longest = max(longest, prompt_len)
            free -= smallest + _answer_slots(req, ratio)
            if free < longest:
                return False
        return free >= longest


def _answer_slots(req: LavaReq, ratio: float) -> int:
    """Slots that its answer is expected to take. Source: SGLang 0.5.23,
    `PrefillAdder._get_running_request_total_token_offset` (schedule_policy.py)."""
    left = min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS)
    return int(left * (1.0 if req.sampling_params.ignore_eos else ratio))
