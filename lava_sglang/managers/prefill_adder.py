# SPDX-License-Identifier: Apache-2.0
"""Admission that knows what compression will take and give back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.managers.schedule_policy import (
    CLIP_MAX_NEW_TOKENS,
    IGNORE_EOS_RESERVE_TOKENS,
    AddReqResult,
    PrefillAdder,
)
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.request import LavaReq

if TYPE_CHECKING:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache


class Candidate(NamedTuple):
    """What admission knows of the request that it looks at, in slots."""

    released: int = 0  # that its compression gives back, of its prompt and of what only it locks
    first_chunk: int = 0  # of its prompt, prefilled in this pass
    # Of answers, until its last chunk: `--prefill-decode-interval` decodes between chunks.
    growth: int = 0


class LavaPrefillBudget(PrefillBudget):
    """SGLang's `PrefillBudget` (srt/mem_cache/prefill_budget.py) that checks two moments.

    SGLang checks prompt and answer together. The prompt of a compressed request is gone when its
    answer grows: it needs prompt and copy now, copy and answer later.

    candidate: whom the checks are about. ahead: slots that compressions at the end of this pass are
    certain to give back; they count for prompts whose last chunk comes later.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, tree_cache: BasePrefixCache) -> None:
        super().__init__(allocator, tree_cache)
        self.candidate = Candidate()
        self.ahead = 0

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
        fits = self.lacking(extend_input_len, total_tokens, max_new_tokens) <= 0
        return (True, chunk_limit) if fits else (False, None)

    def lacking(self, extend_input_len: int, total_tokens: int, max_new_tokens: int) -> int:
        """Slots that the candidate lacks at the worst of its moments; 0 or less if it fits.

        total_tokens: of its prompt, copy and answer, but for what the tree holds and it locks.
        """
        released, first_chunk, growth = self.candidate
        now = total_tokens - max_new_tokens if released else total_tokens
        later = total_tokens - released
        ahead = self.ahead if first_chunk < extend_input_len else 0
        return max(
            first_chunk + self.page_size - self.remaining_current,
            now + growth - self.remaining_current - ahead,
            math.floor(later - self.remaining_total - ahead) + 1,
        )

    def has_capacity(self) -> bool:
        return self.remaining_total + self.ahead > 0 and self.remaining_current > 0

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        now, later = paged_input + self.candidate.growth, paged_input - self.candidate.released
        return now <= self.remaining_current and later <= self.remaining_total

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """Tokens that a half-prefilled request may prefill. None: it waits, where SGLang would fail
        for lack of slots.

        SGLang leaves future answers their slots and takes a part of the chunk. Those of a prompt
        that is compressed are back by then.
        """
        released, first_chunk, _ = self.candidate
        limit = chunk_limit if released else super().available_chunk_tokens(chunk_limit)
        chunk = first_chunk if limit is None else min(limit, first_chunk)
        return limit if chunk + self.page_size <= self.remaining_current else None


class LavaPrefillAdder(PrefillAdder):
    """SGLang's `PrefillAdder` (srt/managers/schedule_policy.py) with the slots of compression.

    A request that does not fit makes running requests shrink, if they may and if that is enough;
    one that does not fit an empty pool is refused.

    decode_steps: that SGLang takes between two chunks, `--prefill-decode-interval`.
    """

    def __init__(
        self,
        *args: Any,
        coordinator: KVCompressionCoordinator,
        decode_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._half_prefilled_waits = False
        self._half_prefilled: LavaReq | None = None
        self.coordinator = coordinator
        self.decode_steps = decode_steps
        self.chunk_size = self.rem_chunk_tokens
        self.compressed_in_this_pass: list[LavaReq] = []
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
        self._reserve_later_chunks()

        def add() -> AddReqResult:
            self._set_candidate(req, self.rem_chunk_tokens)
            self.req_states = None  # of a list without a tree, to which SGLang adds each candidate
            return super(LavaPrefillAdder, self).add_one_req(
                req, has_chunked_req, truncation_align_size
            )

        verdict = add()
        if verdict is not AddReqResult.NO_TOKEN or self._took(req):
            return verdict
        if self._make_room(req):
            verdict = add()
        elif self._make_room_of_its_prefix(req):
            req.init_next_round_input(self.tree_cache)  # what the first copies left of it
            verdict = add()
            if not self._took(req):
                self._match_nothing(req)
                verdict = add()
        if verdict is AddReqResult.NO_TOKEN and not self._took(req) and self._pool_is_empty():
            req.set_finish_with_abort(self._why_it_never_fits(req))
            req.init_next_round_input(self.tree_cache)
            verdict = add()
        return verdict

    def _commit_prefill_admission(self, req: LavaReq, *args: Any, **kwargs: Any) -> None:
        super()._commit_prefill_admission(req, *args, **kwargs)
        self._note(req)

    def add_chunked_req(self, req: LavaReq) -> LavaReq | None:
        self._set_candidate(req, self.rem_chunk_tokens, self.chunked_req_limit)
        unfinished: LavaReq | None = super().add_chunked_req(req)
        if not self._took(req) and self._make_room(req):
            unfinished = super().add_chunked_req(req)
        self._half_prefilled_waits = not self._took(req)
        self._note(req)
        return unfinished

    def _note(self, req: LavaReq) -> None:
        """What this pass does to `req`, for the candidates after it."""
        if not self._took(req):
            return
        if req.extend_end < len(req.full_untruncated_fill_ids):
            self._half_prefilled = req
            return
        plan = req.expected_plan()
        if plan is not None and not plan.exact_first and self._copy_slots(req):
            self.compressed_in_this_pass.append(req)
            self.memory_budget.ahead = self._ahead()

    def _reserve_later_chunks(self) -> None:
        """Keep slots for the rest of a prompt that this pass has begun, where others may come after
        it: SGLang forgets them (shortest-prefill-first, aligned chunks)."""
        req, self._half_prefilled = self._half_prefilled, None
        if req is None:
            return
        rest = len(req.full_untruncated_fill_ids) - req.extend_end
        now = rest + self._copy_slots(req)
        budget = self.memory_budget
        budget.current_offset += now + self._growth(rest)
        budget.total_offset += max(0, now + self._swa_new_tokens(req) - budget.candidate.released)

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
        """Slots of its copy; 0 if it gets none, or if that would not fit a pool without others."""
        slots = req.copy_slots()
        max_new = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        prompt = self.ceil_paged_tokens(len(req.full_untruncated_fill_ids))
        copy = slots + self.per_req_token_overhead + reserve
        size = self.coordinator.demand.pool_slots()
        if req.sampling_params.ignore_eos and self.tree_cache.disable:
            # SGLang plans all of a fixed-length output, and the prompt with it, without a tree.
            fits = prompt + max_new + copy + IGNORE_EOS_RESERVE_TOKENS < size
        else:
            fits = prompt + copy <= size and min(max_new, CLIP_MAX_NEW_TOKENS) + copy < size
        return slots if fits else 0

    def _set_candidate(self, req: LavaReq, *limits: int | None) -> None:
        """limits: tokens of its prompt that this pass may prefill."""
        budget = self.memory_budget
        extend_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        first_chunk = min([extend_len, *(limit for limit in limits if limit is not None)])
        budget.candidate = Candidate(
            released=req.released_slots(self.tree_cache) if self._copy_slots(req) else 0,
            first_chunk=first_chunk,
            growth=self._growth(extend_len - first_chunk),
        )
        with self._lock_node(req.last_node):
            budget.ahead = self._ahead()

    def _growth(self, rest: int) -> int:
        """Slots of running answers until the last chunk of a prompt, of which `rest` tokens come
        after this pass."""
        if not (rest and self.decode_steps and self.chunk_size):
            return 0
        steps = -(-rest // self.chunk_size) * self.decode_steps
        running = [] if self.running_batch is None else self.running_batch.reqs
        return sum(
            self.ceil_paged_tokens(min(steps, self._swa_new_tokens(req)))
            for req in (*running, *self.can_run_list)
        )

    def _ahead(self) -> int:
        """Slots that this pass releases, for certain: what others lock, the candidate too, is not
        counted."""
        if not self.coordinator.config.admit_ahead:
            return 0
        return sum(req.released_slots(self.tree_cache) for req in self.compressed_in_this_pass)

    def _took(self, req: LavaReq) -> bool:
        return bool(self.can_run_list) and self.can_run_list[-1] is req

    def _make_room(self, req: LavaReq) -> bool:
        """Shrink running requests until `req` fits. None of them if that is not enough."""
        # Its matched prefix is nobody's until it is admitted, and first copies evict to find slots.
        with self._lock_node(req.last_node):
            return self._shrink_for(req)

    def _make_room_of_its_prefix(self, req: LavaReq) -> bool:
        """The same where the matched prefix is in the way of a first copy: `req` must be matched
        again. Otherwise what is cached would have to wait where what is not would be admitted."""
        if not self.coordinator.may_shrink or req.prefix_len == 0 or req.session is not None:
            return False  # a session's next turn stands on what it matched
        self._match_nothing(req)
        if self._shrink_for(req):
            return True
        req.init_next_round_input(self.tree_cache)
        return False

    def _match_nothing(self, req: LavaReq) -> None:
        req.match_nothing(self.tree_cache)
        self._set_candidate(req, self.rem_chunk_tokens)

    def _shrink_for(self, req: LavaReq) -> bool:
        if not self.coordinator.may_shrink or self.running_batch is None:
            return False
        if self._lacking(req) > self.coordinator.shrinkable_slots(self.running_batch):
            return False
        return self.coordinator.make_room(self.running_batch, lambda: self._lacking(req) <= 0)

    def _lacking(self, req: LavaReq) -> int:
        """Slots that `req` lacks. Its matched prefix is locked."""
        extend_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        max_new = self._swa_new_tokens(req)
        copy = self._request_slot_reserve_for_req(req)
        total = extend_len + max_new + self.per_req_token_overhead + copy
        return self.memory_budget.lacking(extend_len, total, max_new)

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
