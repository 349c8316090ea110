# SPDX-License-Identifier: Apache-2.0
"""Admission that keeps room for the copy at the end of a prefill."""

from __future__ import annotations

from sglang.srt.managers.schedule_policy import (
    CLIP_MAX_NEW_TOKENS,
    IGNORE_EOS_RESERVE_TOKENS,
    PrefillAdder,
)

from lava_sglang.managers.request import LavaReq


class LavaPrefillAdder(PrefillAdder):
    """SGLang's `PrefillAdder` (srt/managers/schedule_policy.py) with b slots more per request."""

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
        max_new = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        if not (req.sampling_params.ignore_eos and self.tree_cache.disable):
            # SGLang plans all of a fixed-length output where there is no tree.
            max_new = min(max_new, CLIP_MAX_NEW_TOKENS)
        copy = req.copy_slots()
        alone = self.ceil_paged_tokens(total) + max_new + self.per_req_token_overhead + stock
        fits = alone + copy + IGNORE_EOS_RESERVE_TOKENS < self.token_to_kv_pool_allocator.size
        return stock + (copy if fits else 0)
