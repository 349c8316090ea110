# SPDX-License-Identifier: Apache-2.0
"""A request with its compression: its settings and its state. Host numbers only."""

from __future__ import annotations

import logging
from array import array
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from lava_sglang.attention.window import WindowQueries
from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.layer_map import LayerMap
from lava_sglang.managers.compression_state import (
    FOLLOWERS,
    NO_PRESSURE,
    Compressed,
    CompressionPlan,
    CompressionState,
    ExactForNow,
    IllegalTransition,
    Pending,
    Planned,
    Skipped,
    SkipReason,
)
from lava_sglang.mem_cache.row import copy_len, unlocked_by_shrinking
from lava_sglang.mem_cache.sharing import used_by_others
from lava_sglang.policy import method_of

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

logger = logging.getLogger(__name__)


class LavaReq(Req):
    """SGLang's `Req` (srt/managers/schedule_batch.py) with the state of its compression.

    `compression` is the validated settings of this request, `compression_state` what became of
    them. Others read the state, and call the transitions below; they change nothing else.
    """

    def __init__(
        self,
        *args: Any,
        config: KVCompressionConfig,
        layers: LayerMap,
        page_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.layers = layers
        self.page_size = page_size
        self.compression_state: CompressionState = Pending()
        # Shared prefix and suffix in tokens, of the prefill that was launched last.
        self._parts: tuple[int, int] | None = None
        # After a retraction: where what was its own suffix begins.
        self._own_from: int | None = None
        self._used_by_others = 0
        self.compression = config
        try:
            self.compression = config.for_custom_params(self.sampling_params.custom_params)
        except KVCompressionError as error:
            self.set_finish_with_abort(str(error))
        except Exception as error:  # what a client sent ends its own request and nothing else
            logger.exception("KV compression: the settings of request %s", self.rid)
            self.set_finish_with_abort(
                f"KV compression could not read the settings: {type(error).__name__}",
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "InternalServerError",
            )

    def set_finish_with_abort(self, *args: Any, **kwargs: Any) -> None:
        """The first reason stays: with its prompt gone, SGLang's later checks fail for that."""
        if self.to_finish is None:
            super().set_finish_with_abort(*args, **kwargs)

    @property
    def is_health_check(self) -> bool:
        """SGLang's own probe, of one token: no request of anybody's."""
        return str(self.rid).startswith(HEALTH_CHECK_RID_PREFIX)

    @property
    def plan(self) -> CompressionPlan | None:
        """What compressing it does; None before its prefill, and if it stays exact."""
        state = self.compression_state
        return None if isinstance(state, Pending | Skipped) else state.plan

    @property
    def window(self) -> WindowQueries | None:
        """The queries it is to be compressed by; None afterwards, and if its method needs none."""
        state = self.compression_state
        return state.window if isinstance(state, Planned | ExactForNow) else None

    @property
    def budget(self) -> int | None:
        """Slots of its tape; None without one."""
        state = self.compression_state
        return state.budget if isinstance(state, Compressed) else None

    @property
    def compressed(self) -> bool:
        return isinstance(self.compression_state, Compressed)

    @property
    def answer_compressed(self) -> int:
        """Tokens of the answer that went onto the tape or were dropped."""
        state = self.compression_state
        return state.answer_compressed if isinstance(state, Compressed) else 0

    @property
    def skip_reason(self) -> str | None:
        """Why it is exact; None while that is not decided, and if it is not."""
        state = self.compression_state
        if isinstance(state, ExactForNow):
            return NO_PRESSURE
        return str(state.reason) if isinstance(state, Skipped) else None

    @property
    def slots_freed(self) -> int:
        """Slots that the request does without."""
        state = self.compression_state
        if not isinstance(state, Compressed):
            return 0
        return state.plan.suffix_len + state.answer_compressed - state.budget

    @property
    def tail_len(self) -> int:
        """Slots of a decoding request behind its tape; 0 without one."""
        state = self.compression_state
        if not isinstance(state, Compressed):
            return 0
        return int(self.kv.kv_committed_len) - state.plan.shared_prefix_len - state.budget

    @property
    def held_slots(self) -> int:
        """Slots of the suffix, exact or as a tape: what a lower rung may free some of."""
        state = self.compression_state
        if isinstance(state, Compressed):
            return state.budget
        return 0 if self.plan is None else self.plan.suffix_len

    @property
    def next_budget(self) -> int | None:
        """The highest rung below what a decoding request holds; None if it cannot shrink."""
        state = self.compression_state
        if not isinstance(state, ExactForNow | Compressed):
            return None
        return next((rung for rung in state.plan.rungs if rung < self.held_slots), None)

    def begin_prefill(self, num_full_layers: int) -> None:
        """Fix the plan at the launch of the first chunk. A later chunk changes nothing.

        num_full_layers: of the model, whose window queries a plan collects.
        """
        if not isinstance(self.compression_state, Pending):
            return
        exact = min(self.prefix_len, self._shareable_len())
        self._parts = (exact, len(self.full_untruncated_fill_ids) - exact)
        plan = self.plan_for(self.prefix_len)
        if isinstance(plan, SkipReason):
            self.skip_compression(plan)
            return
        window = None
        if method_of(self.compression).needs_queries:
            window = WindowQueries(num_full_layers, self.compression.window_size)
        self._become(Planned(plan, window))

    def skip_compression(self, reason: SkipReason) -> None:
        """It stays exact."""
        self._become(Skipped(reason))

    def stay_exact_for_now(self) -> None:
        """Its prefill has ended and slots are not short."""
        state = self._expect(Planned)
        self._become(ExactForNow(state.plan, state.window))

    def take_tape(self, budget: int) -> None:
        """Its suffix has been copied to a tape of `budget` slots."""
        state = self._expect(Planned, ExactForNow)
        self._become(Compressed(state.plan, budget))

    def shorten_tape(self, budget: int) -> None:
        """Its tape has been cut to `budget` slots."""
        self._become(self._expect(Compressed)._replace(budget=budget))

    def take_answer(self, tokens: int) -> None:
        """Its tape has been chosen again from itself and the `tokens` of the answer behind it."""
        state = self._expect(Compressed)
        self._become(state._replace(answer_compressed=state.answer_compressed + tokens))

    def _become(self, state: CompressionState) -> None:
        before = self.compression_state
        if type(state) not in FOLLOWERS[type(before)]:
            raise IllegalTransition(f"{self.rid}: {before} cannot become {state}")
        self.compression_state = state

    def _expect(self, *states: type) -> Any:
        if not isinstance(self.compression_state, states):
            names = " or ".join(state.__name__ for state in states)
            raise IllegalTransition(f"{self.rid}: {self.compression_state}, must be {names}")
        return self.compression_state

    def plan_for(self, matched_len: int) -> CompressionPlan | SkipReason:
        """The plan if `matched_len` tokens come from the radix tree, or why there is none."""
        config = self.compression
        prompt_len = len(self.full_untruncated_fill_ids)
        shared_prefix_len = min(matched_len, self._shareable_len())
        suffix_len = prompt_len - shared_prefix_len
        if self.to_finish is not None:
            return SkipReason.ABORTED
        if not config.enabled:
            return SkipReason.DISABLED
        if self._is_turn_of_session:
            return SkipReason.SESSION
        if self._unsupported():
            return SkipReason.UNSUPPORTED_REQUEST
        if self.sampling_params.max_new_tokens - len(self.output_ids) <= 1:
            return SkipReason.NO_DECODE
        shortest = self._shortest_suffix()
        if suffix_len < shortest:
            sampled = self.sampling_params.n > 1 and prompt_len >= shortest
            return SkipReason.PARALLEL_SAMPLES if sampled else SkipReason.TOO_SHORT
        rungs = config.rungs(suffix_len, self.page_size, self.layers)
        if not rungs:
            return SkipReason.BUDGET_COVERS_SUFFIX
        exact_first = config.trigger == "pressure" or config.covers(suffix_len)
        return CompressionPlan(prompt_len, shared_prefix_len, rungs, exact_first)

    def waiting_slots(self) -> tuple[int, int]:
        """Tokens of its prompt, and slots of its smallest tape, or of the prompt if it gets none.

        An estimate: nothing of the prompt has been matched yet.
        """
        config = self.compression
        prompt_len = len(self.origin_input_ids) + len(self.output_ids)
        if not config.enabled or prompt_len < self._shortest_suffix():
            return prompt_len, prompt_len
        rungs = config.rungs(prompt_len, self.page_size, self.layers)
        return prompt_len, rungs[-1] if rungs else prompt_len

    def _shortest_suffix(self) -> int:
        """Tokens of the shortest suffix that is compressed: no sliding layer sees past it."""
        return max(self.compression.min_tokens, self.layers.sliding_window - 1)

    def expected_plan(self) -> CompressionPlan | None:
        """Its plan, or the one it would get if its prefill were launched now."""
        if not isinstance(self.compression_state, Pending):
            return self.plan
        plan = self.plan_for(self.prefix_len)
        return plan if isinstance(plan, CompressionPlan) else None

    def copy_slots(self) -> int:
        """Slots its smallest copy needs: what admission keeps free. 0 if it is not compressed."""
        plan = self.expected_plan()
        return 0 if plan is None else plan.rungs[-1]

    def first_copy_len(self, budget: int) -> int:
        """Slots that a copy of its exact suffix takes, and of the answer that moves with it."""
        plan = self.plan
        tail_len = 0 if plan is None else int(self.kv.kv_committed_len) - plan.prompt_len
        return copy_len(budget, tail_len, self.page_size)

    def released_slots(self, tree_cache: BasePrefixCache) -> int:
        """Slots that a first copy gives back, its own not counted: all that nobody else locks, but
        the exact prefix. 0 if it is not to be compressed. Of a waiting request: if it was admitted.
        """
        plan = self.expected_plan()
        if plan is None:
            return 0
        own = max(plan.prompt_len, self.kv.kv_committed_len) - self.kv.cache_protected_len
        return int(own) + unlocked_by_shrinking(self, tree_cache, plan.shared_prefix_len)

    def reset_for_retract(self) -> None:
        """Forget the private copy; the request is prefilled, and compressed, again.

        What was its own suffix stays its own: the exact prompt it left in the tree is matched
        again, and scope "suffix" would otherwise take it for a shared prefix and never compress it.
        """
        super().reset_for_retract()
        if self.plan is not None:
            self._own_from = self.plan.shared_prefix_len
        if self.compressed:
            self.skip_radix_cache_insert = False
        self.compression_state = Pending()

    def info(self) -> dict[str, Any]:
        """`meta_info["kv_compression"]` of the response; token counts."""
        info: dict[str, Any] = {
            "method": self.compression.method,
            "status": "compressed" if self.compressed else "skipped",
            "prompt_tokens": len(self.origin_input_ids),
        }
        if self._parts is not None:
            info["shared_prefix_tokens"], info["suffix_tokens"] = self._parts
        if self.compressed:
            info["kept_tokens"] = self.budget
            if self.answer_compressed:
                info["answer_tokens_compressed"] = self.answer_compressed
        else:
            info["reason"] = self.skip_reason or "not_prefilled"
        info["slots_freed"] = self.slots_freed
        return info

    def init_next_round_input(
        self, tree_cache: BasePrefixCache | None = None, cow_mamba: bool | None = None
    ) -> None:
        """SGLang's match of the prompt against the tree.

        Scope "auto" looks first how far others use the prompt: where the match may end depends
        on it, and SGLang's match splits nodes.
        """
        config = self.compression
        if tree_cache is not None and config.enabled and config.scope == "auto":
            self.refresh_fill_ids()
            text = RadixKey(
                self.full_untruncated_fill_ids, self.extra_key, cache_salt=self.cache_salt
            )
            self._used_by_others = used_by_others(tree_cache, text)
        super().init_next_round_input(tree_cache, cow_mamba)

    def match_nothing(self, tree_cache: BasePrefixCache) -> None:
        """As if the tree held nothing of its prompt, until it is matched again."""
        match_kv_cache(self, tree_cache, array("q"))
        self.kv.cache_protected_len = 0

    def _shareable_len(self) -> int:
        """Tokens from the prompt's start that stay exact and shared if they come from the tree."""
        scope = self.compression.scope
        if scope == "prompt":
            return 0
        if scope == "auto":
            return self._used_by_others
        return len(self.full_untruncated_fill_ids) if self._own_from is None else self._own_from

    def _compute_max_prefix_len(self, input_len: int) -> int:
        """Leave the observation window to be prefilled where a matched prefix is compressed too.

        Its queries do not exist for tokens that come from the tree.
        """
        longest: int = super()._compute_max_prefix_len(input_len)
        shareable_len = self._shareable_len()
        if shareable_len >= longest or isinstance(self.plan_for(shareable_len), SkipReason):
            return longest
        return max(0, min(longest, input_len - self.compression.window_size))

    @property
    def _is_turn_of_session(self) -> bool:
        """Of one that SGLang keeps entries of: by its record, or by a mark on the tree's nodes. A
        `session_id` without --enable-session-radix-cache is a name and nothing else."""
        return self.session is not None or self.session_generation is not None

    def _unsupported(self) -> bool:
        return (
            self.beam_group is not None
            or self.input_embeds is not None
            or self.positional_embed_overrides is not None
            or self.return_routed_experts
            or self.return_indexer_topk
            or (self.skip_radix_cache_insert and not self.compressed)
        )
