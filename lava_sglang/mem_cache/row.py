# SPDX-License-Identifier: Apache-2.0
"""A request's row of `req_to_token`: swaps its exact prompt for b private slots.

Slots change hands through SGLang's own calls, so its counts of free, evictable and private slots
stay right: the tree takes the exact prompt, the request keeps P shared and b private slots.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchPrefixParams, TreeLock
from sglang.srt.mem_cache.common import checkpoint_kv_cache, evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey


def alloc_slots(tree_cache: BasePrefixCache, budget: int, tail_len: int = 0) -> torch.Tensor | None:
    """Fresh slots, int64 [budget], and as many more as the tail's pages where pages are larger than
    a slot: in the row it moves by less than a page. Evicts unlocked tree entries to find them."""
    allocator: Any = tree_cache.token_to_kv_pool_allocator
    count = copy_len(budget, tail_len, allocator.page_size)
    if count > allocator.available_size() + tree_cache.evictable_size():
        return None  # SGLang would evict all that it can before it finds that out
    evict_from_tree_cache(tree_cache, count)
    slots: torch.Tensor | None = allocator.alloc(count)
    return None if slots is None else slots.long()


def copy_len(budget: int, tail_len: int, page_size: int) -> int:
    """Slots that a first copy takes of a request with so many tokens behind its prompt."""
    return budget if page_size == 1 else budget + -(-tail_len // page_size) * page_size


def swap_in_private_slots(
    req: Req,
    tree_cache: BasePrefixCache,
    shared_prefix_len: int,
    slots: torch.Tensor,
    tail_slots: torch.Tensor | None = None,
) -> None:
    """Make the request physically `shared_prefix_len + len(slots)` and its tail long.

    Its exact prompt goes to the tree as evictable entries, which later prompts may match; the
    lock shrinks to the shared prefix; the row holds that prefix, `slots`, and the tail: in its own
    slots, or in `tail_slots`, to which it was copied. Mutates the request, its row and the tree.
    Without a tree (--disable-radix-cache) the prompt's slots are freed.
    Source: `UnifiedRadixCache.checkpoint_into_tree`, `release_kv_cache` (SGLang 0.5.23).
    """
    kv = req.kv
    prompt_len, committed = req.extend_end, kv.kv_committed_len
    rows = tree_cache.req_to_token_pool
    if committed == prompt_len:
        # Later SGLang has done it itself, with the result of the prefill.
        checkpoint_kv_cache(req, tree_cache)
    freed_until = prompt_len if tail_slots is None else committed
    if tail_slots is None:
        tail_slots = rows.req_to_token[kv.req_pool_idx, prompt_len:committed].clone()
    # The tree owns whole pages; what is past them is the request's own to free.
    if kv.cache_protected_len < freed_until:
        tree_cache.free_kv_row(kv, [(kv.cache_protected_len, freed_until)])
    _lock_only(req, tree_cache, shared_prefix_len)
    private = torch.cat([slots, tail_slots]).to(torch.int32)
    end = shared_prefix_len + len(private)
    rows.write((kv.req_pool_idx, slice(shared_prefix_len, end)), private)
    kv.cache_protected_len = shared_prefix_len
    kv.kv_committed_len = end
    kv.kv_allocated_len = end
    # Keeps SGLang's own later checkpoints and its final insert from publishing lossy entries.
    req.skip_radix_cache_insert = True


def unlocked_by_shrinking(req: Req, tree_cache: BasePrefixCache, length: int) -> int:
    """Tokens of the tree that nobody would lock any more if the request's lock moved from all that
    it has matched to the first `length` tokens. Before it is admitted: if it had that lock.

    Measured by doing it, on the host, and undone: other requests' locks are what they were.
    """
    if tree_cache.disable or length >= req.kv.cache_protected_len:
        return 0
    node = req.last_node if req.lock is None else req.lock.node
    whole = tree_cache.lock(node)
    tree_cache.unlock(req.lock)
    protected = tree_cache.protected_size()
    shrunk = _lock_prefix(req, tree_cache, length)
    tree_cache.unlock(whole)
    unlocked = protected - tree_cache.protected_size()
    if req.lock is not None:
        req.lock = tree_cache.lock(node)
    tree_cache.unlock(shrunk)
    return int(unlocked)


def drop_slots(req: Req, tree_cache: BasePrefixCache, start: int, end: int) -> None:
    """Free places [start, end) of a request's row, whole private pages; what follows moves down.

    Mutates the request and its row.
    """
    kv = req.kv
    rows = tree_cache.req_to_token_pool
    tail = rows.req_to_token[kv.req_pool_idx, end : kv.kv_committed_len].clone()
    tree_cache.free_kv_row(kv, [(start, end)])
    rows.write((kv.req_pool_idx, slice(start, start + len(tail))), tail)
    kv.kv_committed_len -= end - start
    kv.kv_allocated_len -= end - start


def replace_slots(
    req: Req, tree_cache: BasePrefixCache, shared_prefix_len: int, slots: torch.Tensor
) -> None:
    """Put `slots`, int64 [budget], in the place of all a request's private ones, and free those.

    Mutates the request and its row.
    """
    kv = req.kv
    tree_cache.free_kv_row(kv, [(shared_prefix_len, kv.kv_committed_len)])
    end = shared_prefix_len + len(slots)
    tree_cache.req_to_token_pool.write(
        (kv.req_pool_idx, slice(shared_prefix_len, end)), slots.to(torch.int32)
    )
    kv.kv_committed_len = end
    kv.kv_allocated_len = end


def _lock_only(req: Req, tree_cache: BasePrefixCache, length: int) -> None:
    """Move the request's tree lock from its whole prompt to the first `length` tokens."""
    whole = req.lock
    req.lock = _lock_prefix(req, tree_cache, length)
    if req.lock is not None:
        req.last_node = req.lock.node
    tree_cache.unlock(whole)


def _lock_prefix(req: Req, tree_cache: BasePrefixCache, length: int) -> TreeLock | None:
    """One more lock on the first `length` tokens of its prompt, which the tree holds."""
    if length == 0:
        return None
    key = RadixKey(
        req.full_untruncated_fill_ids, req.extra_key, limit=length, cache_salt=req.cache_salt
    )
    match = tree_cache.match_prefix(MatchPrefixParams(key=key))
    assert match.device_prefix_len == length, (match.device_prefix_len, length)
    return tree_cache.lock(match.last_device_node)
