# SPDX-License-Identifier: Apache-2.0
"""Rewrites one request's entries: the exact suffix to a tape, and a tape to a shorter one.

Everything is known on the host but which entries are kept, so nothing is read back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from lava_sglang.attention.device_state import DeviceState
from lava_sglang.attention.window import DecodeQueries
from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.arena import as_bits
from lava_sglang.kernels.compact import compact
from lava_sglang.kernels.tail_scores import tail_rows, tail_scores
from lava_sglang.kernels.trim import refill, trim
from lava_sglang.managers.compression_state import Compressed, ExactForNow, Planned, SkipReason
from lava_sglang.managers.forward_stream import ForwardStream
from lava_sglang.managers.request import LavaReq
from lava_sglang.mem_cache.row import (
    alloc_slots,
    drop_slots,
    replace_slots,
    swap_in_private_slots,
)
from lava_sglang.metrics import StreamTimer
from lava_sglang.policy import (
    PromptView,
    load_methods,
    method_of,
    score_prompt,
    select_again,
    select_entries,
    select_fewer,
    tape_entries,
    tape_scores,
)

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 64
"""Tokens before the window of the prompt that `Compressor.warm_up` makes up."""


class Compressor:
    """Device work on the pool of one scheduler: entries, tables and rows. What became of a request
    is returned; its state is its own."""

    def __init__(self, model: DeviceState, scheduler: Scheduler):
        self.arena = model.pool.arena
        self.req_to_token = model.req_to_token
        self.layers, self.num_qo_heads, self.dtype = model.layers, model.num_qo_heads, model.dtype
        self.scaling, self.logit_cap = model.scaling, model.logit_cap
        self.tape = model.tape
        self.scores = model.scores
        self.timer = StreamTimer(model.pool.device)
        self.stream = ForwardStream(scheduler)
        self.tree_cache = scheduler.tree_cache

    def reset_rows(self, rows: list[int]) -> None:
        """SGLang hands `rows` to new owners: of a prefill, or the members of a beam, which have
        none. Behind the forward passes that still read them for the owners before."""
        with self.stream:
            self.tape.reset(rows)

    def warm_up(self, config: KVCompressionConfig) -> None:
        """Compile and load what a compression by the server's method launches, and a trim.

        Compresses a made-up prompt whose tokens all lie in slot 0, SGLang's padding. Mutates
        nothing else. A method that only a request names compiles at its first request.
        """
        load_methods()
        arena, window_size, method = self.arena, config.window_size, method_of(config)
        shape = (len(self.layers.full), window_size, self.num_qo_heads, arena.shape[4])
        fewest = self.layers.fewest_slots(window_size, config.ragged)
        budget = fewest + WARM_UP_TOKENS // 2
        tokens = max(fewest + WARM_UP_TOKENS, self.layers.sliding_window)
        slots = torch.zeros(tokens, dtype=torch.int64, device=arena.device)
        queries = torch.zeros(shape, dtype=self.dtype, device=arena.device)
        prompt = self._prompt(slots, queries, 0, window_size)
        prompt_scores = score_prompt(method, prompt)
        kept = select_entries(method, prompt_scores, prompt, budget)
        compact(arena, slots, slots[:budget], kept.tape_tokens, kept.offsets)
        if self.scores is not None:
            scores = tape_scores(prompt, prompt_scores, kept)
            fewer = select_fewer(
                method,
                self.layers,
                scores,
                kept.offsets,
                prompt_scores.layer_weights,
                len(slots),
                window_size,
                fewest,
            )
            trim(arena, slots[:budget], fewer.places, fewest)

    def _prompt(
        self,
        slots: torch.Tensor,
        queries: torch.Tensor | None,
        shared_prefix_len: int,
        window_size: int,
    ) -> PromptView:
        return PromptView(
            arena=self.arena,
            slots=slots,
            layers=self.layers,
            queries=queries,
            scaling=self.scaling,
            shared_prefix_len=shared_prefix_len,
            window_size=window_size,
            logit_cap=self.logit_cap,
        )

    def compress(
        self, req: LavaReq, state: Planned | ExactForNow, budget: int
    ) -> SkipReason | None:
        """Copy what the request's method keeps of its suffix to `budget` fresh slots.

        Mutates its row, its slots and the tree; the exact suffix becomes evictable. Returns why
        nothing was done: there is no room for the copy, or nothing to score by; None if it is done.
        """
        plan, window = state.plan, state.window
        method = method_of(req.compression)
        if method.needs_queries and (window is None or not window.complete):
            logger.error("no window queries for %s: served uncompressed", req.rid)
            return SkipReason.NO_QUERIES
        private = alloc_slots(self.tree_cache, budget, req.kv.kv_committed_len - plan.prompt_len)
        if private is None:
            return SkipReason.NO_ROOM
        row = req.kv.req_pool_idx
        # A snapshot: the tree may rewrite the row.
        exact_slots = self.req_to_token[row, : req.kv.kv_committed_len].long()
        prompt_slots = exact_slots[: plan.prompt_len]
        slots = private[:budget]
        tail_slots = None
        self.stream.keep_alive(private, exact_slots)
        with self.stream, self.timer:
            queries = None if window is None else window.queries()
            prompt = self._prompt(
                prompt_slots, queries, plan.shared_prefix_len, req.compression.window_size
            )
            prompt_scores = score_prompt(method, prompt)
            kept = select_entries(method, prompt_scores, prompt, budget)
            compact(self.arena, prompt_slots, slots, kept.tape_tokens, kept.offsets)
            if self.scores is not None:
                self.scores.write(slots, tape_scores(prompt, prompt_scores, kept))
                self.scores.layer_weights[row] = prompt_scores.layer_weights
            if len(private) > budget:  # whole pages: the tail does not start where a page does
                tail = exact_slots[plan.prompt_len :]
                tail_slots = private[budget : budget + len(tail)]
                entries = as_bits(self.arena)  # torch has no index_put of fp8
                entries[:, :, tail_slots] = entries[:, :, tail]
            removed = plan.suffix_len - budget
            self.tape.commit(row, plan.shared_prefix_len, budget, removed, kept.offsets)
        self.stream.fence_row_writes()
        swap_in_private_slots(req, self.tree_cache, plan.shared_prefix_len, slots, tail_slots)
        return None

    def trim(self, req: LavaReq, state: Compressed, budget: int) -> None:
        """Keep the best of a compressed request's entries, in the first `budget` of its slots.

        Mutates its row, and frees the other slots. The kept entries are those of a compression to
        `budget` at once. Only a server with a ladder has the scores that it chooses by.
        """
        plan, old = state.plan, state.budget
        assert self.scores is not None, "a request has lower rungs on a server without a ladder"
        row, prefix_len = req.kv.req_pool_idx, plan.shared_prefix_len
        slots = self.req_to_token[row, prefix_len : prefix_len + old].long()
        self.stream.keep_alive(slots)
        with self.stream, self.timer:
            scores = self.scores.read(slots)
            kept = select_fewer(
                method_of(req.compression),
                self.layers,
                scores,
                self.tape.offsets[row],
                self.scores.layer_weights[row],
                plan.suffix_len,
                req.compression.window_size,
                budget,
                width=plan.suffix_len + state.answer_compressed,
            )
            trim(self.arena, slots, kept.places, budget)
            self.scores.write(slots[:budget], scores[kept.places])
            removed = req.slots_freed + old - budget
            self.tape.commit(row, prefix_len, budget, removed, kept.offsets)
        self.stream.fence_row_writes()
        drop_slots(req, self.tree_cache, prefix_len + budget, prefix_len + old)

    def compress_tail(self, req: LavaReq, state: Compressed, queries: DecodeQueries) -> bool:
        """Choose a tape of the same budget again, from the old one and the answer behind it.

        The last decode steps take the place of the prompt's observation window. Mutates its row,
        and frees all its old private slots. Returns False where there is no room for the copy.
        """
        plan, budget = state.plan, state.budget
        tail_len, prefix_len = req.tail_len, plan.shared_prefix_len
        slots = alloc_slots(self.tree_cache, budget)
        if slots is None:
            return False
        row, committed = req.kv.req_pool_idx, req.kv.kv_committed_len
        old_slots = self.req_to_token[row, :committed].long()
        prefix, tape, tail = old_slots.split([prefix_len, budget, tail_len])
        method, window_size = method_of(req.compression), req.compression.window_size
        removed = req.slots_freed
        self.stream.keep_alive(slots, old_slots)
        with self.stream, self.timer:
            offsets = self.tape.offsets[row].clone()
            width = plan.suffix_len + state.answer_compressed
            scores = tail_scores(
                queries.last(row, committed + removed),
                self.arena,
                prefix,
                tape,
                offsets,
                tail,
                self.scaling,
                width,
                method.score_options(window_size, slots.device),
                layers=self.layers.full,
                logit_cap=self.logit_cap,
            )
            kept = select_again(method, scores, offsets, window_size, budget)
            owner, index = tape_entries(kept)
            source = tail_rows(self.arena, tape, offsets, tail, width, owner, index)
            refill(self.arena, source, slots)
            if self.scores is not None:
                self.scores.write(slots, scores.flatten(0, 1)[owner, index])
            self.tape.commit(row, prefix_len, budget, removed + tail_len, kept.offsets)
        self.stream.fence_row_writes()
        replace_slots(req, self.tree_cache, prefix_len, slots)
        return True
