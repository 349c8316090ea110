# SPDX-License-Identifier: Apache-2.0
"""A request's row of `req_to_token`: swaps its exact prompt for b private slots.

Slots change hands through SGLang's own calls, so its counts of free, evictable and private slots
stay right: the tree takes the exact prompt, the request keeps P shared and b private slots.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchPrefixParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey


def alloc_slots(tree_cache: BasePrefixCache, count: int) -> torch.Tensor | None:
    """`count` fresh slots, int64 [count]; evicts unlocked tree entries to find them."""
    evict_from_tree_cache(tree_cache, count)
    allocator: Any = tree_cache.token_to_kv_pool_allocator
    slots: torch.Tensor | None = allocator.alloc(count)
    return None if slots is None else slots.long()


def swap_in_private_slots(
    req: Req, tree_cache: BasePrefixCache, shared_prefix_len: int, slots: torch.Tensor
) -> None:
    """Make the request physically `shared_prefix_len + len(slots)` long.

    Its exact prompt goes to the tree as evictable entries, which later prompts may match; the
    lock shrinks to the shared prefix; the row holds that prefix and `slots`. Mutates the request,
    its row and the tree. Without a tree (--disable-radix-cache) the prompt's slots are freed.
    Source: `UnifiedRadixCache.checkpoint_into_tree`, `release_kv_cache` (SGLang 0.5.23).
    """
    kv = req.kv
    prompt_len = req.extend_end
    checkpoint_kv_cache(req, tree_cache)
    # The tree owns whole pages; what is past them is the request's own to free.
    if kv.cache_protected_len < prompt_len:
        tree_cache.free_kv_row(kv, [(kv.cache_protected_len, prompt_len)])
    _lock_only(req, tree_cache, shared_prefix_len)
    end = shared_prefix_len + slots.shape[0]
    tree_cache.req_to_token_pool.write(
        (kv.req_pool_idx, slice(shared_prefix_len, end)), slots.to(torch.int32)
    )
    kv.cache_protected_len = shared_prefix_len
    kv.kv_committed_len = end
    kv.kv_allocated_len = end
    # Keeps SGLang's own later checkpoints and its final insert from publishing lossy entries.
    req.skip_radix_cache_insert = True


def _lock_only(req: Req, tree_cache: BasePrefixCache, length: int) -> None:
    """Move the request's tree lock from its whole prompt to the first `length` tokens."""
    whole = req.lock
    req.lock = None
    if length > 0:
        key = RadixKey(
            req.full_untruncated_fill_ids,
            req.extra_key,
            limit=length,
            cache_salt=req.cache_salt,
        )
        match = tree_cache.match_prefix(MatchPrefixParams(key=key))
        assert match.device_prefix_len == length, (match.device_prefix_len, length)
        req.last_node = match.last_device_node
        req.lock = tree_cache.lock(match.last_device_node)
    tree_cache.unlock(whole)
