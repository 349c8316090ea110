# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator and radix tree as numbers: who holds how many slots, and no tensor.

They have the methods that SGLang's `PrefillAdder` calls. A slot is free, a request's own, or the
tree's, where it is protected (a request locks it) or evictable. Pages are of one token.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget


class Node:
    """A run of tokens in the tree, under the run that comes before it."""

    __slots__ = ("children", "key", "length", "locks", "parent")

    def __init__(self, key: Hashable, parent: Node | None):
        self.key = key
        self.parent = parent
        self.length = 0
        self.locks = 0
        self.children = 0

    @property
    def depth(self) -> int:
        """Tokens from the root to its end."""
        return sum(node.length for node in self.path())

    def path(self) -> Iterator[Node]:
        """The node and what is above it."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class SlotTree:
    """A radix tree two levels deep: what a group shares, then what is a request's own."""

    disable = False
    buffer_pipeline = None
    token_to_kv_pool_allocator: SlotPool

    def __init__(self) -> None:
        self.root = Node(None, None)
        self.nodes: dict[Hashable, Node] = {}
        self.leaves: dict[Hashable, Node] = {}  # evictable ones, the oldest first
        self.evictable = self.protected = 0

    def match(self, group: Hashable, rid: Hashable) -> Node:
        """The deepest node on the path of this request's prompt."""
        return self.nodes.get(rid) or self.nodes.get(group) or self.root

    def insert(self, group: Hashable, shared: int, rid: Hashable, length: int) -> tuple[Node, int]:
        """The prompt of `length` tokens, of which the group shares `shared`.

        Returns its node, and how many tokens of it the tree did not hold: it takes over their
        slots.
        """
        parent, taken = self.root, 0
        if shared:
            parent = self._child(group, self.root)
            taken += self._grow(parent, shared)
        node = self._child(rid, parent)
        taken += self._grow(node, length - shared)
        return node, taken

    def lock(self, node: Node) -> Node:
        for each in node.path():
            if each.locks == 0:
                self.protected += each.length
                self.evictable -= each.length
                self.leaves.pop(each.key, None)
            each.locks += 1
        return node

    def unlock(self, lock: Node) -> None:
        for each in lock.path():
            each.locks -= 1
            if each.locks == 0:
                self.protected -= each.length
                self.evictable += each.length
                self._may_be_leaf(each)

    def evict(self, tokens: int) -> int:
        """Forget the oldest leaves until `tokens` slots are free; returns how many are."""
        freed = 0
        while freed < tokens and self.leaves:
            key, node = next(iter(self.leaves.items()))
            del self.leaves[key], self.nodes[key]
            freed += node.length
            if node.parent is not None:
                node.parent.children -= 1
                self._may_be_leaf(node.parent)
        self.evictable -= freed
        return freed

    def evictable_size(self) -> int:
        return self.evictable

    def supports_mamba(self) -> bool:
        return False

    def supports_prefix_sharing(self) -> bool:
        return True

    def load_back_is_cache_owned(self) -> bool:
        return False

    def finish_storage_prefetch_admission(self, *args: Any, **kwargs: Any) -> None:
        """There is no storage."""

    def discard_storage_prefetch_accounting(self, *args: Any) -> None:
        """There is no storage."""

    def _child(self, key: Hashable, parent: Node) -> Node:
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = Node(key, parent)
            parent.children += 1
            self.leaves.pop(parent.key, None)
            self._may_be_leaf(node)
        return node

    def _grow(self, node: Node, length: int) -> int:
        grown = max(length - node.length, 0)
        node.length += grown
        if node.locks:
            self.protected += grown
        else:
            self.evictable += grown
        return grown

    def _may_be_leaf(self, node: Node) -> None:
        if node.children == 0 and node.locks == 0 and node is not self.root:
            self.leaves[node.key] = node


class SlotPool:
    """The allocator: free slots, and what the tree gives up when there are too few."""

    page_size = 1

    def __init__(self, size: int, tree: SlotTree):
        self.size = size
        self.free = size
        self.tree = tree
        tree.token_to_kv_pool_allocator = self

    def take(self, slots: int) -> bool:
        """False, and nothing is taken, if tree and pool together have too few."""
        if self.free < slots:
            if not self.has(slots):
                return False
            self.free += self.tree.evict(slots - self.free)
        self.free -= slots
        return True

    def has(self, slots: int) -> bool:
        """Whether `take` would succeed."""
        return self.free + self.tree.evictable >= slots

    def give_back(self, slots: int) -> None:
        self.free += slots

    def available_size(self) -> int:
        return self.free

    def create_prefill_budget(
        self, tree_cache: SlotTree, *, num_mixed_decode_tokens: int = 0
    ) -> PrefillBudget:
        return PrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def request_slot_reserve(self, *, has_req_pool_slot: bool, prefill_tokens: int = 0) -> int:
        return 0
