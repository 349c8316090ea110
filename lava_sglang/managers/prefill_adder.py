# SPDX-License-Identifier: Apache-2.0
"""Admission that knows what compression will take and give back."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import (
    CLIP_MAX_NEW_TOKENS,
    IGNORE_EOS_RESERVE_TOKENS,
    AddReqResult,
    PrefillAdder,
)
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.request import LavaReq


class LavaPrefillBudget(PrefillBudget):
    """SGLang's `PrefillBudget` (srt/mem_cache/prefill_budget.py) that checks two moments.

    SGLang checks prompt and answer together. The prompt of a compressed request is gone when its
    answer grows: it needs prompt and copy now, copy and answer later. The attributes are set for
    each candidate. Slots:

    released: of the candidate's prompt, that its compression gives back.
    ahead: that compressions at the end of this pass are certain to give back. They count for
    prompts whose last chunk comes later.
    first_chunk: of the candidate's prompt, prefilled in this pass.
    """

    released = 0
    ahead = 0
    first_chunk = 0

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        max_new_tokens: int,
        input_tokens: int,
        swa_host_hit_length: int,
        chunk_limit: int | None,
        auxiliary_swa_host_hit_length: int = 0,
    ) -> tuple[bool, int | None]:
        prompt_and_copy = total_tokens - max_new_tokens if self.released else total_tokens
        copy_and_answer = total_tokens - self.released
        ahead = self.ahead if self.first_chunk < extend_input_len else 0
        fits = (
            self.first_chunk + self.page_size <= self.remaining_current
            and prompt_and_copy <= self.remaining_current + ahead
            and copy_and_answer < self.remaining_total + ahead
        )
        return (True, chunk_limit) if fits else (False, None)

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        later = paged_input - self.released
        return paged_input <= self.remaining_current and later <= self.remaining_total


class LavaPrefillAdder(PrefillAdder):
    """SGLang's `PrefillAdder` (srt/managers/schedule_policy.py) with the slots of compression.

    A request that does not fit makes running requests shrink, if they may and if that is enough;
    one that does not fit an empty pool is refused.
    """

    def __init__(self, *args: Any, coordinator: KVCompressionCoordinator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.coordinator = coordinator
        stock = self.memory_budget
        self.memory_budget: LavaPrefillBudget = LavaPrefillBudget(stock.allocator, stock.tree_cache)
        reserve = 0 if self.running_batch is None else coordinator.copy_reserve(self.running_batch)
        self.memory_budget.total_offset = stock.total_offset + reserve
        self.memory_budget.current_offset = stock.current_offset + reserve

    def add_one_req(
        self, req: LavaReq, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        if self._half_prefilled_waits or (has_chunked_req and self.chunked_req_limit is None):
            # SGLang keeps one half-prefilled request and fails on a second. It counts on there
            # being no slot left for the second's first chunk, but running requests may shrink.
            return AddReqResult.OTHER

        def add() -> AddReqResult:
            self._set_candidate(req)
            return super(LavaPrefillAdder, self).add_one_req(
                req, has_chunked_req, truncation_align_size
            )

        verdict = add()
        if verdict is not AddReqResult.NO_TOKEN or self._took(req):
            return verdict
        if self._make_room(req):
            verdict = add()
        elif self._pool_is_empty():
            req.set_finish_with_abort(self._why_it_never_fits(req))
            req.init_next_round_input(self.tree_cache)
            verdict = add()
        return verdict

    def _commit_prefill_admission(self, req: LavaReq, *args: Any, **kwargs: Any) -> None:
        super()._commit_prefill_admission(req, *args, **kwargs)
        self._count_ahead(req)

    def add_chunked_req(self, req: LavaReq) -> LavaReq | None:
        self._set_candidate(req)
        unfinished: LavaReq | None = super().add_chunked_req(req)
        if not self._took(req) and self._make_room(req):
            unfinished = super().add_chunked_req(req)
        self._half_prefilled_waits = not self._took(req)
        self._count_ahead(req)
        return unfinished

    _half_prefilled_waits = False

    def _request_slot_reserve_for_req(
        self, req: LavaReq, *, extend_input_len: int | None = None
    ) -> int:
        """Slots to keep free beyond the prefill: those of the copy, if this pass finishes it.

        A request that fits an empty pool only without them is admitted without: it is compressed
        if the room is there when its prefill ends, since its output takes none before.
        """
        stock: int = super()._request_slot_reserve_for_req(req, extend_input_len=extend_input_len)
        total = len(req.full_untruncated_fill_ids)
        if extend_input_len is not None and req.prefix_len + extend_input_len < total:
            return stock
        return stock + self._copy_slots(req, stock)

    def _copy_slots(self, req: LavaReq, reserve: int = 0) -> int:
        """Slots of its copy; 0 if it gets none, or if that would not fit an empty pool."""
        slots = req.copy_slots()
        max_new = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        prompt = self.ceil_paged_tokens(len(req.full_untruncated_fill_ids))
        copy = slots + self.per_req_token_overhead + reserve
        size: int = self.token_to_kv_pool_allocator.size
        if req.sampling_params.ignore_eos and self.tree_cache.disable:
            # SGLang plans all of a fixed-length output, and the prompt with it, without a tree.
            fits = prompt + max_new + copy + IGNORE_EOS_RESERVE_TOKENS < size
        else:
            fits = prompt + copy <= size and min(max_new, CLIP_MAX_NEW_TOKENS) + copy < size
        return slots if fits else 0

    def _set_candidate(self, req: LavaReq) -> None:
        budget = self.memory_budget
        extend_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        # Of a half-prefilled request, the chunks that it holds too.
        released = extend_len if req.plan is None else req.plan.suffix_len
        budget.released = released if self._copy_slots(req) else 0
        limit = extend_len if self.rem_chunk_tokens is None else self.rem_chunk_tokens
        budget.first_chunk = min(extend_len, limit)
        budget.ahead = self._ahead(req)

    _released_in_this_pass = 0

    def _count_ahead(self, req: LavaReq) -> None:
        """What the end of this pass releases of `req`, if it was taken and finishes in it."""
        finishes = req.extend_end == len(req.full_untruncated_fill_ids)
        plan = req.expected_plan()
        if self._took(req) and finishes and plan is not None and not plan.exact_first:
            self._released_in_this_pass += plan.suffix_len

    def _ahead(self, candidate: LavaReq) -> int:
        """Slots that this pass releases, for certain: less all that others may hold of them."""
        if not self.coordinator.config.admit_ahead or not self._released_in_this_pass:
            return 0
        others = [candidate, *self.can_run_list]
        if self.running_batch is not None:
            others += self.running_batch.reqs
        matched = sum(req.prefix_len for req in others)
        return max(0, self._released_in_this_pass - matched)

    def _took(self, req: LavaReq) -> bool:
        return bool(self.can_run_list) and self.can_run_list[-1] is req

    def _make_room(self, req: LavaReq) -> bool:
        """Shrink running requests until `req` fits. None of them if that is not enough."""
        if not self.coordinator.may_shrink or self.running_batch is None:
            return False

        def enough() -> bool:
            return self._shortfall(req) <= 0

        spare = self.coordinator.shrinkable_slots(self.running_batch)
        if self._shortfall(req) > spare:
            return False
        return self.coordinator.make_room(self.running_batch, enough)

    def _shortfall(self, req: LavaReq) -> int:
        """Slots that `req` lacks, at the worse of the two moments that the budget checks."""
        budget = self.memory_budget
        extend_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        max_new = self._swa_new_tokens(req)
        now = extend_len + self.per_req_token_overhead + self._request_slot_reserve_for_req(req)
        later = now + max_new - budget.released
        # The matched prefix counts as free until it is locked.
        short_now = now + req.prefix_len - budget.remaining_current
        short_later = later + req.prefix_len + 1 - budget.remaining_total
        return int(max(short_now, short_later))

    def _pool_is_empty(self) -> bool:
        size: int = self.token_to_kv_pool_allocator.size
        return not self.can_run_list and self.coordinator.demand.free_slots() == size

    def _why_it_never_fits(self, req: LavaReq) -> str:
        prompt_len = len(req.full_untruncated_fill_ids)
        return (
            f"This request never fits the KV pool of {self.token_to_kv_pool_allocator.size} slots: "
            f"{prompt_len} prompt tokens + {self._swa_new_tokens(req)} new tokens + "
            f"{self._request_slot_reserve_for_req(req)} for the copy + "
            f"{self.per_req_token_overhead} for its last page"
        )
