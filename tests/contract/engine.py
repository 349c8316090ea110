# SPDX-License-Identifier: Apache-2.0
"""SGLang's memory without its model: real pools, tree, rows and requests, on CPU.

Slots are taken and given back by SGLang's own calls, in the order in which its scheduler makes
them. In place of a forward pass, every entry is written as what it is: layer, head, position and
token; so a test can say whose entry a slot holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, release_req
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens
from sglang.srt.mem_cache.allocation import alloc_for_decode, alloc_for_extend
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import nn

from lava_sglang.attention.device_state import DeviceState
from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.select import Selection
from lava_sglang.managers.coordinator import KVCompressionCoordinator
from lava_sglang.managers.request import LavaReq
from lava_sglang.mem_cache.pool import LavaMHATokenToKVPool
from lava_sglang.mem_cache.tape import TapeTable
from lava_sglang.metrics import CompressionStats
from lava_sglang.policy import PromptView, keep, method_of

NUM_LAYERS = 2
KV_HEADS = 2
QUERY_HEADS = 6
HEAD_DIM = 4
SCALING = 0.01
CONFIG = KVCompressionConfig(
    method="streamingllm", min_tokens=16, window_size=4, sink_tokens=2, scope="suffix"
)


@dataclass
class Batch:
    """What the lifecycle and SGLang's allocation read of a ScheduleBatch."""

    reqs: list[LavaReq]
    engine: Engine
    seq_lens_cpu: torch.Tensor
    prefix_lens: list[int] = field(default_factory=list)
    extend_lens: list[int] = field(default_factory=list)
    device: str = "cpu"
    hisparse_coordinator: None = None
    model_config: Any = field(default_factory=lambda: SimpleNamespace(is_encoder_decoder=False))

    def __post_init__(self) -> None:
        self.seq_lens = self.seq_lens_cpu.clone()
        self.seq_lens_sum: int | None = int(self.seq_lens.sum())
        self.extend_num_tokens = sum(self.extend_lens)
        self.req_to_token_pool = self.engine.rows
        self.tree_cache = self.engine.tree

    @property
    def req_pool_indices(self) -> torch.Tensor:
        return torch.tensor([req.kv.req_pool_idx for req in self.reqs])

    req_pool_indices_cpu = req_pool_indices

    def maybe_evict_swa(self) -> None: ...

    def is_dllm(self) -> bool:
        return False


@dataclass
class Engine:
    """`prefilling` and `decoding` own a row each; `prompts` is what a request is scored by."""

    pool: LavaMHATokenToKVPool
    allocator: Any
    rows: ReqToTokenPool
    tree: UnifiedRadixCache
    config: KVCompressionConfig
    model: DeviceState
    coordinator: KVCompressionCoordinator = field(init=False)
    prefilling: list[LavaReq] = field(default_factory=list)
    decoding: list[LavaReq] = field(default_factory=list)
    prompts: dict[str, PromptView] = field(default_factory=dict)
    served: list[tuple[array[int], str | None]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        """What the lifecycle reads of a scheduler."""
        self.scheduler = SimpleNamespace(
            enable_overlap=False,
            device="cpu",
            tree_cache=self.tree,
            running_batch=SimpleNamespace(reqs=self.decoding),
            waiting_queue=[],
            chunked_req=None,
            new_token_ratio_tracker=SimpleNamespace(current=0.0),
        )
        self.coordinator = KVCompressionCoordinator(
            self.config, self.model, self.scheduler, CompressionStats()
        )

    @property
    def tape(self) -> TapeTable:
        return self.model.tape

    def request(
        self,
        tokens: Sequence[int],
        config: KVCompressionConfig = CONFIG,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> LavaReq:
        self.count += 1
        return LavaReq(
            f"request-{self.count}",
            "",
            array("q", tokens),
            SamplingParams(
                max_new_tokens=max_new_tokens, custom_params=kwargs.pop("custom_params", None)
            ),
            config=config,
            layers=self.model.layers,
            page_size=self.tree.page_size,
            vocab_size=100_000,
            **kwargs,
        )

    def admit(self, req: LavaReq) -> bool:
        """Match and lock its prefix, if the rest fits; as `PrefillAdder.add_one_req`."""
        req.init_next_round_input(self.tree)
        lock = self.tree.lock(req.last_node)
        needed = len(req.full_untruncated_fill_ids) - req.prefix_len + self.tree.page_size
        if needed > self.allocator.available_size() + self.tree.evictable_size():
            self.tree.unlock(lock)
            return False
        req.lock = lock
        self.prefilling.append(req)
        return True

    def extend(self, *chunks: tuple[LavaReq, int | None], process: bool = True) -> Batch:
        """One prefill step. chunks: request and tokens, None for all that is left."""
        reqs = [req for req, _ in chunks]
        for req, size in chunks:
            total = len(req.full_untruncated_fill_ids)
            req.extend_end = total if size is None else min(total, req.prefix_len + size)
        batch = Batch(
            reqs,
            self,
            torch.tensor([req.extend_end for req in reqs]),
            [req.prefix_len for req in reqs],
            [req.extend_len for req in reqs],
        )
        alloc_for_extend(batch)
        self.coordinator.begin_extend(batch)
        for req in reqs:
            self.write(req, req.prefix_len, req.extend_end)
        self.hand_over_queries(batch)
        for req in reqs:
            self.look_at(req)
        if process:
            self.coordinator.end_extend(batch)
            for req in reqs:
                self.process(req)
        return batch

    def process(self, req: LavaReq) -> None:
        """The result of a chunk: SGLang checkpoints it whether it is the last or not."""
        if req.extend_end == len(req.full_untruncated_fill_ids):
            self.prefilling.remove(req)
            self.decoding.append(req)
            self.served.append((req.full_untruncated_fill_ids[:], req.extra_key))
            req.output_ids.append(len(req.output_ids) + 1)
        checkpoint_kv_cache(req, self.tree)

    def decode(self) -> None:
        """One token for every decoding request."""
        if not self.decoding:
            return
        lengths = torch.tensor([req.kv.kv_committed_len for req in self.decoding])
        batch = Batch(self.decoding, self, lengths)
        alloc_for_decode(batch, 1)
        shifted = self.tape.shift(lengths, batch.req_pool_indices)
        for req, position in zip(self.decoding, shifted.tolist(), strict=True):
            assert position == len(req.origin_input_ids) + len(req.output_ids) - 1
            req.refresh_fill_ids()
            self.write(req, req.kv.kv_committed_len - 1, req.kv.kv_committed_len, position)
            self.hand_over_decode_query(req, position)
            req.output_ids.append(len(req.output_ids) + 1)

    def finish(self, req: LavaReq) -> None:
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        self.decoding.remove(req)
        release_kv_cache(req, self.tree, checkpoint=True)
        if not req.compressed:
            self.served.append((req.full_untruncated_fill_ids[:], req.extra_key))

    def retract(self, req: LavaReq) -> None:
        (self.decoding if req in self.decoding else self.prefilling).remove(req)
        release_req(
            req=req,
            remaing_req_count=0,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )

    def entries(self, layer: int, head: int, positions: Any, tokens: Any) -> torch.Tensor:
        """[n, HEAD_DIM] keys of these prompt positions; values are their negatives."""
        columns = torch.zeros(len(positions), HEAD_DIM)
        columns[:, 0], columns[:, 1] = layer + 1, head + 1
        columns[:, 2] = torch.as_tensor(positions, dtype=torch.float32) + 1
        columns[:, 3] = torch.as_tensor(tokens, dtype=torch.float32)
        return columns

    def write(self, req: LavaReq, start: int, end: int, position: int | None = None) -> None:
        """Entries of row places [start, end), which are positions from `position` on."""
        first = start if position is None else position
        positions = range(first, first + end - start)
        slots = self.rows.req_to_token[req.kv.req_pool_idx, start:end].long()
        tokens = req.full_untruncated_fill_ids[first : first + end - start]
        for layer in range(NUM_LAYERS):
            for head in range(KV_HEADS):
                keys = self.entries(layer, head, positions, list(tokens))
                self.pool.k_buffer[layer][slots, head] = keys
                self.pool.v_buffer[layer][slots, head] = -keys

    def hand_over_queries(self, batch: Batch) -> None:
        """What a forward pass hands to the capture, in the batch's order of tokens."""
        for layer in range(NUM_LAYERS if self.coordinator.capture.segments else 0):
            queries = [
                self.queries(req, req.prefix_len, req.extend_end, layer) for req in batch.reqs
            ]
            attention = SimpleNamespace(
                layer_id=layer, tp_q_head_num=QUERY_HEADS, qk_head_dim=HEAD_DIM
            )
            self.coordinator.capture.capture(attention, torch.cat(queries).flatten(1))

    def hand_over_decode_query(self, req: LavaReq, position: int) -> None:
        """What each layer's decode hands to the ring, if there is one."""
        stash = self.coordinator.decode_queries
        for layer in range(0 if stash is None else NUM_LAYERS):
            assert stash is not None
            attention = SimpleNamespace(
                layer_id=layer, tp_q_head_num=QUERY_HEADS, qk_head_dim=HEAD_DIM
            )
            batch = SimpleNamespace(
                positions=torch.tensor([position]),
                req_pool_indices=torch.tensor([req.kv.req_pool_idx]),
            )
            query = self.queries(req, position, position + 1, layer)
            stash.store(attention, query.flatten(1), batch)

    def queries(self, req: LavaReq, start: int, end: int, layer: int) -> torch.Tensor:
        """[end - start, QUERY_HEADS, HEAD_DIM], the same whatever the chunks."""
        places = torch.arange(QUERY_HEADS * HEAD_DIM, dtype=torch.float32)
        tokens = torch.arange(start, end, dtype=torch.float32)[:, None]
        return torch.sin(tokens * (places + 1) + layer).view(-1, QUERY_HEADS, HEAD_DIM)

    def look_at(self, req: LavaReq) -> None:
        """What the request is scored by, from its text and not from slots."""
        plan = req.plan
        if plan is None or req.extend_end < plan.prompt_len:
            return
        window = req.compression.window_size
        tokens = list(req.full_untruncated_fill_ids[: plan.prompt_len])
        positions = range(plan.prompt_len)
        columns = [
            self.entries(layer, head, positions, tokens)
            for layer in range(NUM_LAYERS)
            for head in range(KV_HEADS)
        ]
        keys = torch.stack(columns).view(NUM_LAYERS, KV_HEADS, -1, HEAD_DIM).transpose(1, 2)
        first = plan.prompt_len - window
        queries = [self.queries(req, first, plan.prompt_len, layer) for layer in range(NUM_LAYERS)]
        self.prompts[req.rid] = PromptView(
            arena=torch.stack([keys, -keys], dim=1).contiguous(),
            slots=torch.arange(plan.prompt_len),
            layers=self.model.layers,
            queries=torch.stack(queries),
            scaling=torch.full((NUM_LAYERS,), SCALING),
            shared_prefix_len=plan.shared_prefix_len,
            window_size=window,
        )

    def kept_of(self, req: LavaReq) -> Selection:
        """What a request of this text keeps if it is compressed to its budget at once."""
        assert req.budget is not None
        method = method_of(req.compression)
        return keep(method, self.prompts[req.rid], req.budget)

    def row(self, req: LavaReq, end: int | None = None) -> torch.Tensor:
        last = req.kv.kv_committed_len if end is None else end
        return self.rows.req_to_token[req.kv.req_pool_idx, :last].long()

    def places_of(self, req: LavaReq, layer: int, head: int) -> tuple[torch.Tensor, list[int]]:
        """Where a head's entries are, [n, 3]: layer, slot, head; and their positions in the text.

        Of a compressed request by the tape's rule, from the table that the backends read.
        """
        row = self.row(req)
        plan = req.plan
        if not req.compressed or plan is None:
            return own_places(layer, row, head), list(range(len(row)))
        prefix_len, budget = plan.shared_prefix_len, req.budget
        assert budget is not None
        column = layer * KV_HEADS + head
        first, end = self.tape.offsets[req.kv.req_pool_idx, column : column + 2].tolist()
        private = row[prefix_len : prefix_len + budget]
        tape = [
            [e // (KV_HEADS * budget), int(private[e % budget]), e % (KV_HEADS * budget) // budget]
            for e in range(first, end)
        ]
        tail = row[prefix_len + budget :]
        places = [
            own_places(layer, row[:prefix_len], head),
            torch.tensor(tape, dtype=torch.int64).view(-1, 3),
            own_places(layer, tail, head),
        ]
        positions = [
            *range(prefix_len),
            *self.kept_of(req).tape_tokens[first:end].tolist(),
            *range(plan.prompt_len, plan.prompt_len + len(tail)),
        ]
        return torch.cat(places), positions

    def tree_slots(self) -> torch.Tensor:
        return self.tree.all_values_flatten().long()

    def free_slots(self) -> torch.Tensor:
        page = self.tree.page_size
        if page == 1:
            return torch.cat([self.allocator.free_pages, self.allocator.release_pages])
        pages = self.allocator.get_all_free_pages()
        return (pages[:, None] * page + torch.arange(page)).flatten()

    def private_slots(self, req: LavaReq) -> torch.Tensor:
        """Slots of the request's own pages, the unused ends of its last page included."""
        page = self.tree.page_size
        kv = req.kv
        own = self.row(req, kv.kv_allocated_len)[kv.cache_protected_len :]
        if page == 1:
            return own
        pages = torch.unique(own // page)
        return (pages[:, None] * page + torch.arange(page)).flatten()

    def check(self) -> None:
        """Every slot has one owner, and every owner has its own entries."""
        live = self.check_slots()
        self.check_locks()
        for req in live:
            self.check_entries(req)
        for tokens, extra_key in self.served:
            self.check_prefix(tokens, extra_key)
        if not live and not self.tree.disable:
            self.tree.sanity_check()

    def check_slots(self) -> list[LavaReq]:
        """Every slot has one owner. Returns the requests that own any."""
        live = [req for req in self.prefilling + self.decoding if req.kv.holds_kv]
        private = [self.private_slots(req) for req in live]
        counted = sum(kv_private_tokens(req.kv, self.tree.page_size) for req in live)
        assert counted == sum(len(slots) for slots in private)
        held = self.tree.evictable_size() + self.tree.protected_size()
        assert self.allocator.available_size() + held + counted == self.allocator.size
        every = torch.cat([self.free_slots(), self.tree_slots(), *private])
        assert every.sort().values.tolist() == list(
            range(self.tree.page_size, self.allocator.size + self.tree.page_size)
        )
        return live

    def check_locks(self) -> None:
        """A compressed request locks its shared prefix, any other all that the tree has of it."""
        locked: set[int] = set()
        for req in self.prefilling + self.decoding:
            if req.lock is None or self.tree.disable:
                assert req.compressed or self.tree.disable
                continue
            path = self.tree.path_device_indices(req.lock.node).tolist()
            expected = req.kv.cache_protected_len if req.kv.holds_kv else req.prefix_len
            assert len(path) == expected
            if req.compressed and req.plan is not None:
                assert len(path) == req.plan.shared_prefix_len
            if req.kv.holds_kv:
                assert path == self.row(req, len(path)).tolist()
            locked.update(path)
        assert self.tree.protected_size() == len(locked)

    def check_entries(self, req: LavaReq) -> None:
        self.check_tape(req)
        tokens = list(req.full_untruncated_fill_ids)
        for layer in range(NUM_LAYERS):
            for head in range(KV_HEADS):
                places, positions = self.places_of(req, layer, head)
                keys = self.entries(layer, head, positions, [tokens[p] for p in positions])
                layers, slots, heads = places.T
                assert torch.equal(self.pool.arena[layers, 0, slots, heads], keys)
                assert torch.equal(self.pool.arena[layers, 1, slots, heads], -keys)

    def check_tape(self, req: LavaReq) -> None:
        """The request's row of the tables says what its plan says, and row 0 nothing."""
        tape, row = self.tape, req.kv.req_pool_idx
        tape.check_integrity(row)
        found = tape.prefix_lens[row], tape.budgets[row], tape.position_deltas[row]
        if req.compressed and req.plan is not None:
            plan = req.plan
            assert found == (plan.shared_prefix_len, req.budget, req.slots_freed)
            assert torch.equal(tape.offsets[row], self.kept_of(req).offsets)
        else:
            assert found == (0, 0, 0)
        assert (tape.prefix_lens[0], tape.budgets[0], tape.position_deltas[0]) == (0, 0, 0)

    def check_prefix(self, tokens: array[int], extra_key: str | None) -> None:
        """What the tree holds of a text is exact, whoever was compressed."""
        match = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens, extra_key)))
        length = match.device_prefix_len
        if length == 0:
            return
        slots = self.tree.path_device_indices(match.last_device_node)[:length].long()
        for layer in range(NUM_LAYERS):
            for head in range(KV_HEADS):
                keys = self.entries(layer, head, range(length), list(tokens[:length]))
                assert torch.equal(self.pool.k_buffer[layer][slots, head], keys)
                assert torch.equal(self.pool.v_buffer[layer][slots, head], -keys)


def running_batch(engine: Engine) -> Any:
    """The decoding requests between two steps."""
    lengths = torch.tensor([req.kv.kv_committed_len for req in engine.decoding])
    batch = Batch(engine.decoding, engine, lengths)
    batch.__dict__["new_tokens_required_next_decode"] = lambda: len(engine.decoding)
    return batch


def own_places(layer: int, slots: torch.Tensor, head: int) -> torch.Tensor:
    """int64 [n, 3]: the entries of these slots in the head's own column."""
    return torch.stack([torch.full_like(slots, layer), slots, torch.full_like(slots, head)], dim=1)


def build_engine(
    page_size: int = 1,
    slots: int = 512,
    disable_radix_cache: bool = False,
    dtype: torch.dtype = torch.float32,
    config: KVCompressionConfig = CONFIG,
) -> Engine:
    pool = LavaMHATokenToKVPool(
        size=slots,
        page_size=page_size,
        dtype=dtype,
        head_num=KV_HEADS,
        head_dim=HEAD_DIM,
        layer_num=NUM_LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    allocator: Any = (
        TokenToKVPoolAllocator(slots, dtype, "cpu", pool, need_sort=False)
        if page_size == 1
        else PagedTokenToKVPoolAllocator(slots, page_size, dtype, "cpu", pool, need_sort=False)
    )
    rows = ReqToTokenPool(
        size=16, max_context_len=2 * slots, device="cpu", enable_memory_saver=False
    )
    tree = UnifiedRadixCache(
        CacheInitParams(
            disable=disable_radix_cache,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
        )
    )
    layers = [
        RadixAttention(QUERY_HEADS, HEAD_DIM, SCALING, KV_HEADS, layer_id)
        for layer_id in range(NUM_LAYERS)
    ]
    runner: Any = SimpleNamespace(
        model=nn.ModuleList(layers),
        model_config=SimpleNamespace(dtype=torch.float32),
        token_to_kv_pool=pool,
        req_to_token_pool=rows,
    )
    return Engine(pool, allocator, rows, tree, config, DeviceState(config, runner))
