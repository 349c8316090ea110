# SPDX-License-Identifier: Apache-2.0
"""A request with its compression: settings, plan, outcome. Host numbers only, no device tensor."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from sglang.srt.managers.schedule_batch import Req

from lava_sglang.attention.window import WindowQueries
from lava_sglang.config import KVCompressionConfig, KVCompressionError


class SkipReason(StrEnum):
    """Why a request is served uncompressed. Always legal; counted by reason."""

    DISABLED = "disabled"  # the request asked for it
    TOO_SHORT = "too_short"  # suffix below min_tokens
    BUDGET_COVERS_SUFFIX = "budget_covers_suffix"  # nothing would be dropped
    NO_DECODE = "no_decode"  # at most one output token: no later step would read less
    NO_ROOM = "no_room"  # no b free slots for the copy
    NO_QUERIES = "no_queries"  # the attention backend handed over no window queries
    ABORTED = "aborted"  # ended before its prefill did
    UNSUPPORTED_REQUEST = "unsupported_request"  # beam search, sessions, embeddings, captures


class CompressionPlan(NamedTuple):
    """What compressing one prompt does, known on the host before it is prefilled."""

    prompt_len: int  # I = P + N, tokens
    shared_prefix_len: int  # P, tokens
    budget: int  # b, slots

    @property
    def suffix_len(self) -> int:
        """N, tokens."""
        return self.prompt_len - self.shared_prefix_len

    @property
    def slots_freed(self) -> int:
        return self.suffix_len - self.budget

    @property
    def compressed_len(self) -> int:
        """Slots of the request after compression, before its first output token."""
        return self.shared_prefix_len + self.budget


class LavaReq(Req):
    """SGLang's `Req` (srt/managers/schedule_batch.py) with the state of its compression.

    `compression` is the validated settings of this request. `plan` is set when its prefill is
    first launched; `compressed` once its row holds the kept entries.
    """

    def __init__(
        self, *args: Any, config: KVCompressionConfig, page_size: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.page_size = page_size
        self.plan: CompressionPlan | None = None
        self.skip_reason: SkipReason | None = None
        self.compressed = False
        self.window: WindowQueries | None = None
        self.compression = config
        override = (self.sampling_params.custom_params or {}).get("kv_compression")
        if override is not None:
            try:
                self.compression = config.for_request(override)
            except KVCompressionError as error:
                self.set_finish_with_abort(str(error))

    def plan_for(self, shared_prefix_len: int) -> CompressionPlan | SkipReason:
        """The plan if `shared_prefix_len` tokens come from the radix tree, or why there is none."""
        config = self.compression
        prompt_len = len(self.full_untruncated_fill_ids)
        if config.scope == "prompt":
            shared_prefix_len = 0
        suffix_len = prompt_len - shared_prefix_len
        if self.to_finish is not None:
            return SkipReason.ABORTED
        if not config.enabled:
            return SkipReason.DISABLED
        if self._unsupported():
            return SkipReason.UNSUPPORTED_REQUEST
        if self.sampling_params.max_new_tokens - len(self.output_ids) <= 1:
            return SkipReason.NO_DECODE
        if suffix_len < config.min_tokens:
            return SkipReason.TOO_SHORT
        budget = config.kept_tokens(suffix_len, self.page_size)
        if budget >= suffix_len:
            return SkipReason.BUDGET_COVERS_SUFFIX
        return CompressionPlan(prompt_len, shared_prefix_len, budget)

    def begin_prefill(self) -> None:
        """Fix the plan at the launch of the first chunk. A later chunk changes nothing."""
        if self.plan is not None or self.skip_reason is not None:
            return
        plan = self.plan_for(self._shared_prefix_len())
        if isinstance(plan, SkipReason):
            self.skip_reason = plan
        else:
            self.plan = plan

    def copy_slots(self) -> int:
        """Slots the copy at the end of prefill needs: what admission keeps free. 0 if no copy."""
        if self.skip_reason is not None:
            return 0
        plan = self.plan or self.plan_for(self._shared_prefix_len())
        return plan.budget if isinstance(plan, CompressionPlan) else 0

    def reset_for_retract(self) -> None:
        """Forget the private copy; the request is prefilled, and compressed, again.

        What was its own suffix stays its own: the exact prompt it left in the tree is matched
        again, and would otherwise be taken for a shared prefix and never compressed.
        """
        super().reset_for_retract()
        if self.plan is not None:
            self._own_from = self.plan.shared_prefix_len
        if self.compressed:
            self.skip_radix_cache_insert = False
        self.plan = None
        self.skip_reason = None
        self.compressed = False
        self.window = None

    def info(self) -> dict[str, Any]:
        """`meta_info["kv_compression"]` of the response; token counts."""
        info: dict[str, Any] = {
            "method": self.compression.method,
            "status": "compressed" if self.compressed else "skipped",
            "prompt_tokens": len(self.origin_input_ids),
        }
        if self.plan is not None and self.compressed:
            info["shared_prefix_tokens"] = self.plan.shared_prefix_len
            info["suffix_tokens"] = self.plan.suffix_len
            info["kept_tokens"] = self.plan.budget
            info["slots_freed"] = self.plan.slots_freed
        else:
            info["reason"] = str(self.skip_reason) if self.skip_reason else "not_prefilled"
            info["slots_freed"] = 0
        return info

    _own_from: int | None = None

    def _shared_prefix_len(self) -> int:
        if self._own_from is None:
            return self.prefix_len
        return min(self.prefix_len, self._own_from)

    def _compute_max_prefix_len(self, input_len: int) -> int:
        """Leave the observation window to be prefilled where a matched prefix is compressed too.

        Its queries do not exist for tokens that come from the tree.
        """
        longest: int = super()._compute_max_prefix_len(input_len)
        if self._own_from is None and self.compression.scope != "prompt":
            return longest
        if not isinstance(self.plan_for(self._own_from or 0), CompressionPlan):
            return longest
        return max(0, min(longest, input_len - self.compression.window_size))

    def _unsupported(self) -> bool:
        return (
            self.beam_group is not None
            or self.session is not None
            or self.input_embeds is not None
            or self.positional_embed_overrides is not None
            or self.multimodal_inputs is not None
            or self.return_routed_experts
            or self.return_indexer_topk
            or (self.skip_radix_cache_insert and not self.compressed)
        )
