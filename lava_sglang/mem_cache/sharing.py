# SPDX-License-Identifier: Apache-2.0
"""How far other texts use a text's entries in the radix tree: what scope "auto" keeps shared."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey


def used_by_others(tree_cache: Any, text: RadixKey) -> int:
    """Tokens from the start of `text`, whole pages, that another text in the tree has too.

    Another text is one that goes on differently: somewhere it has other tokens than `text`. It
    does not matter who sent it. Whatever agrees as far as both go is the text's own: the earlier
    turns of its chat, the same prompt sent before, an answer or a later turn behind it.

    Looks at the tree along the text, without splitting or touching a node. Host only.
    """
    if tree_cache.disable:
        return 0
    core = tree_cache.tree_core
    # pinned_len: where the last node on the way ends, which the text may leave in its middle.
    matched_len, last_node, pinned_len = core.match_full_device_prefix(text)
    (path,) = core.collect_path_info([last_node])
    if not path:
        return 0
    *inner, last = path
    ends_there = matched_len == len(text) // tree_cache.page_size * tree_cache.page_size
    if not ends_there and (matched_len < pinned_len or last.num_children > 0):
        return int(matched_len)
    # One child of an inner node is the text's own way on.
    return max((node.path_end for node in inner if node.num_children > 1), default=0)
