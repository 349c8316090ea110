# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the tape by FlashInfer: prefix and tail in one call, the tape in another.

Prefix and tail are the same slots in every layer and head, so FlashInfer's paged wrapper reads
them as it reads any request: one plan a step, for all layers. On the tape every head has its own
length, which no FlashInfer call knows of; so heads become rows of the batch, [bs * H, G, D] queries
over one KV head and pages of one entry. A page index is the entry's place in the whole arena. Tape
lengths do not change while a request decodes: each layer has a wrapper, planned when the batch
changes. Both results are merged by their log-sum-exp, which is in base 2 on either side.

A plan needs the lengths on the host, and exact ones: FlashInfer launches one block for each chunk
of what it is told, so a plan by an upper bound would run blocks past the end of a piece.

Page indices are int32. FlashInfer widens them to size_t before it multiplies with the stride
(page.cuh, `get_elem_offset`), so only their number is limited. Source: flashinfer-python 0.7.2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lava_sglang.kernels.arena import check_arena, entry_place
from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.reference import exact_slots_ref, tape_pages_ref

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 16
MAX_PAGES = 2**31
FLOAT_WORKSPACE = 128 * 2**20  # bytes, as FlashInfer recommends: partial results of split heads
BLOCK = 1024

WRAPPER = "BatchDecodeWithPagedKVCacheWrapper"
MERGE = "merge_state_in_place"
_PLAN = (
    "self", "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim",
    "page_size",
)  # fmt: skip
CALLS = {
    f"{WRAPPER}.__init__": (
        "self", "float_workspace_buffer", "kv_layout", "use_tensor_cores", "backend",
    ),
    f"{WRAPPER}.reset_workspace_buffer": ("self", "float_workspace_buffer", "int_workspace_buffer"),
    f"{WRAPPER}.plan": _PLAN,
    f"{WRAPPER}._plan_impl": (*_PLAN, "q_data_type", "kv_data_type", "sm_scale"),
    f"{WRAPPER}.run": ("self", "q", "paged_kv_cache", "return_lse"),
    MERGE: ("v", "s", "v_other", "s_other", "mask"),
}  # fmt: skip
"""What we call in FlashInfer and the arguments that we name; `plan` hands its own on."""


def shape_reasons(arena: torch.Tensor, num_qo_heads: int) -> list[str]:
    """What FlashInfer's kernels do not take, one sentence each."""
    num_layers, slots, num_kv_heads, head_dim = check_arena(arena)
    group, pages = num_qo_heads // num_kv_heads, num_layers * 2 * slots * num_kv_heads
    reasons = []
    if arena.dtype not in DTYPES:
        reasons.append(f"KV entries of {arena.dtype}: FlashInfer decode accepts float16, bfloat16")
    if head_dim not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        reasons.append(f"head_dim={head_dim}: FlashInfer decode accepts {accepted}")
    if group > MAX_GROUP:
        reasons.append(
            f"{group} query heads per KV head: FlashInfer decode accepts up to {MAX_GROUP}"
        )
    if pages >= MAX_PAGES:
        reasons.append(
            f"{pages} K and V rows in {slots} slots: FlashInfer decode accepts fewer than 2**31, "
            "its page indices are int32"
        )
    return reasons


def fixed_bytes(num_layers: int, num_kv_heads: int, max_bs: int, device: torch.device | str) -> int:
    """Bytes that `FlashInferDecode` takes besides its page list."""
    wrappers = num_layers + 1
    return FLOAT_WORKSPACE + wrappers * plan_bytes(max_bs * num_kv_heads, torch.device(device))


def plan_bytes(max_rows: int, device: torch.device) -> int:
    """Bytes of a wrapper's largest plan, for a batch of `max_rows` heads: up to 32 blocks on a
    multiprocessor if heads are split, and ten int32 of each block."""
    sms = 1
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    return 2**16 + 40 * (max_rows + 32 * sms)


class FlashInferDecode:
    """FlashInfer's wrappers over one arena, and the page lists that they read.

    All work is enqueued on the current stream. `plan_tape` when the batch changes, `plan_exact` at
    every step, then `run` for each layer.
    """

    def __init__(
        self,
        flashinfer: Any,
        arena: torch.Tensor,
        num_qo_heads: int,
        max_bs: int,
        scaling: float,
    ):
        """
        flashinfer: the module. arena: [num_layers, 2, slots, num_kv_heads, head_dim], K and V.
        max_bs: largest batch. scaling: factor on the logits of every layer.
        Allocates a page list of 4 bytes an entry, and small workspaces for each layer.
        """
        self.arena = arena
        self.num_layers, slots, self.num_kv_heads, self.head_dim = check_arena(arena)
        self.num_qo_heads = num_qo_heads
        self.group = num_qo_heads // self.num_kv_heads
        self.scaling = scaling
        self.merge_state_in_place = getattr(flashinfer, MERGE)
        # An entry's V row lies one plane behind its K row: the same page index serves both.
        plane = slots * self.num_kv_heads
        rows = arena.view(-1, 1, 1, self.head_dim)
        self.tape_cache = (rows[:-plane], rows[plane:])
        self.pages = torch.empty(
            self.num_layers * slots * self.num_kv_heads, dtype=torch.int32, device=arena.device
        )
        self.planning_tape, self.planning_exact = PlanFence(arena.device), PlanFence(arena.device)
        workspace = torch.zeros(FLOAT_WORKSPACE, dtype=torch.uint8, device=arena.device)
        wrapper = getattr(flashinfer, WRAPPER)
        make = WrapperFactory(wrapper, workspace, self.group >= 4, max_bs * self.num_kv_heads)
        self.exact = make()
        self.tape = [make() for _ in range(self.num_layers)]
        self.tape_lens = [0] * self.num_layers
        self.on_tape = torch.empty(0)

    def plan_tape(self, tables: BatchTables, offsets_cpu: torch.Tensor) -> None:
        """Plan every layer for a batch of requests; `run` then needs the same batch.

        offsets_cpu: int32 [bs, num_layers * num_kv_heads + 1] on the host, the batch's rows of
        `offsets`; zeros for a request that is not compressed.
        """
        bs = len(tables.req_pool_indices)
        layout = TapeLayout(offsets_cpu, self.num_layers, self.num_kv_heads)
        self.tape_lens = layout.layer_lens
        if not any(self.tape_lens):
            return
        tape_pages(
            self.pages,
            layout.starts.to(self.arena.device, non_blocking=True),
            self.arena,
            tables,
            layout.longest,
        )
        self.on_tape = layout.on_tape.to(self.arena.device, non_blocking=True)
        pages = self.pages.split([*self.tape_lens, len(self.pages) - sum(self.tape_lens)])
        with self.planning_tape:
            for layer, count in enumerate(self.tape_lens):
                if count:
                    rows = bs * self.num_kv_heads
                    self._plan(self.tape[layer], layout.indptr[layer], pages[layer], rows, 1)

    def plan_exact(self, tables: BatchTables, exact_lens_cpu: torch.Tensor) -> None:
        """Plan prefix and tail of this step, for all layers.

        exact_lens_cpu: int [bs] on the host, P + tail of each request, the new token included.
        """
        bs = len(exact_lens_cpu)
        assert int(exact_lens_cpu.min()) > 0, f"{exact_lens_cpu.tolist()}: each has its new token"
        indptr = torch.zeros(bs + 1, dtype=torch.int32)
        indptr[1:] = exact_lens_cpu.cumsum(0)
        slots = torch.empty(int(indptr[-1]), dtype=torch.int32, device=self.arena.device)
        exact_slots(
            slots,
            indptr.to(self.arena.device, non_blocking=True),
            tables,
            int(exact_lens_cpu.max()),
        )
        with self.planning_exact:
            self._plan(self.exact, indptr, slots, bs, self.num_kv_heads)

    def run(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q: [bs, num_qo_heads, head_dim] of the planned batch, after RoPE. Returns its shape."""
        q = q.contiguous()
        cache = (self.arena[layer, 0].unsqueeze(1), self.arena[layer, 1].unsqueeze(1))
        out, lse = self.exact.run(q=q, paged_kv_cache=cache, return_lse=True)
        if self.tape_lens[layer]:
            rows = (-1, self.group, self.head_dim)
            tape_out, tape_lse = self.tape[layer].run(
                q=q.view(rows), paged_kv_cache=self.tape_cache, return_lse=True
            )
            self.merge_state_in_place(
                v=out.view(rows), s=lse.view(rows[:2]), v_other=tape_out, s_other=tape_lse,
                mask=self.on_tape[layer],
            )  # fmt: skip
        return out

    def warm_up(self) -> None:
        """Compile or load FlashInfer's modules now, and not at the first request: one over slot 0.

        Reads slot 0, writes no entry.
        """
        device = self.arena.device
        columns = self.num_layers * self.num_kv_heads
        row = torch.zeros(1, dtype=torch.int32, device=device)
        budget = torch.ones(1, dtype=torch.int32, device=device)
        slots = torch.zeros(1, 2, dtype=torch.int32, device=device)
        even = torch.arange(columns + 1, dtype=torch.int32)[None]
        tables = BatchTables(slots, row, budget + 1, row, budget, even.to(device))
        self.plan_tape(tables, even)
        self.plan_exact(tables, torch.ones(1, dtype=torch.int32))
        shape = (1, self.num_qo_heads, self.head_dim)
        self.run(torch.zeros(shape, dtype=self.arena.dtype, device=device), 0)

    def _plan(
        self, wrapper: Any, indptr: torch.Tensor, pages: torch.Tensor, rows: int, kv_heads: int
    ) -> None:
        """indptr stays on the host, where FlashInfer reads it, and is copied from there."""
        wrapper.plan(
            indptr=indptr,
            indices=pages,
            last_page_len=torch.ones(rows, dtype=torch.int32),
            num_qo_heads=kv_heads * self.group,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim,
            page_size=1,
            q_data_type=self.arena.dtype,
            kv_data_type=self.arena.dtype,
            sm_scale=self.scaling,
        )


class WrapperFactory:
    """Makes wrappers that share one workspace for partial results: they run one after the other.

    FlashInfer gives each 8 MB for its plan, on the device and pinned on the host; with one wrapper
    a layer that adds up, so each gets what its largest plan takes.
    """

    def __init__(self, wrapper: Any, workspace: torch.Tensor, tensor_cores: bool, max_rows: int):
        self.wrapper, self.workspace, self.tensor_cores = wrapper, workspace, tensor_cores
        self.plan_bytes = plan_bytes(max_rows, workspace.device)

    def __call__(self) -> Any:
        # The group sizes of FlashInfer's CUDA-core kernels are 1, 2, 3, 4, 6, 8, 16; from 4 up
        # tensor cores are faster. Source: SGLang, flashinfer_backend.should_use_tensor_core.
        made = self.wrapper(
            float_workspace_buffer=self.workspace, kv_layout="NHD",
            use_tensor_cores=self.tensor_cores, backend="fa2",
        )  # fmt: skip
        made.reset_workspace_buffer(
            float_workspace_buffer=self.workspace,
            int_workspace_buffer=torch.empty(
                self.plan_bytes, dtype=torch.uint8, device=self.workspace.device
            ),
        )
        return made


class PlanFence:
    """Holds the host until the device has copied the last plan out of pinned memory.

    A plan is written there and copied behind what was launched before; the host may be a step
    ahead. The copy has been done long since, unless the host is two ahead.
    """

    def __init__(self, device: torch.device):
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def __exit__(self, *exc: Any) -> None:
        if self.copied is not None:
            self.copied.record()


class TapeLayout:
    """Where each head's pages are in the page list: layer by layer, request by request, then head.

    All on the host. indptr: int32 [L, bs * H + 1], of each layer's own part of the list.
    starts: int64 [L, bs], place in the whole list of a request's first page. on_tape: bool
    [L, bs * H], heads that keep any entry. layer_lens: pages of each layer. longest: most pages of
    one request in one layer.
    """

    def __init__(self, offsets_cpu: torch.Tensor, num_layers: int, num_kv_heads: int):
        lens = offsets_cpu.diff(dim=1).view(-1, num_layers, num_kv_heads)
        rows = lens.transpose(0, 1).flatten(1).contiguous()  # [L, bs * H]
        self.indptr = torch.zeros(num_layers, rows.shape[1] + 1, dtype=torch.int32)
        self.indptr[:, 1:] = rows.cumsum(1)
        self.layer_lens: list[int] = self.indptr[:, -1].tolist()
        ends = self.indptr[:, -1].long().cumsum(0)
        first = ends - self.indptr[:, -1]
        self.starts = (first[:, None] + self.indptr[:, :-1:num_kv_heads]).contiguous()
        self.on_tape = rows > 0
        self.longest = int(lens.sum(2).max()) if len(lens) else 0


def tape_pages(
    pages: torch.Tensor,
    starts: torch.Tensor,
    arena: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """List where each head's tape entries are in `arena.view(-1, head_dim)`: their K rows.

    pages: int32 [any], mutated. starts: int64 [num_layers, bs], place in it of a request's first
    page of a layer; its heads follow one another. longest: most pages of a request in a layer.
    A request whose budget is 0 has no page.
    """
    run = tape_pages_triton if pages.is_cuda else tape_pages_ref
    run(pages, starts, arena, tables, longest)


def tape_pages_triton(
    pages: torch.Tensor,
    starts: torch.Tensor,
    arena: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """`tape_pages` by the Triton kernel."""
    req_to_token, req_pool_indices, _, prefix_lens, budgets, offsets = tables
    num_layers, slots, num_kv_heads, _ = check_arena(arena)
    bs = len(req_pool_indices)
    assert starts.shape == (num_layers, bs) and starts.is_contiguous(), starts.shape
    assert pages.dtype == req_to_token.dtype == offsets.dtype == torch.int32
    assert prefix_lens.dtype == budgets.dtype == torch.int32
    assert offsets.shape[1] == num_layers * num_kv_heads + 1, offsets.shape
    assert req_to_token.stride(1) == offsets.stride(1) == 1
    _write_pages[(bs, num_layers, triton.cdiv(longest, BLOCK))](
        pages,
        starts,
        req_to_token,
        req_pool_indices,
        prefix_lens,
        budgets,
        offsets,
        bs,
        slots,
        req_to_token.stride(0),
        offsets.stride(0),
        H=num_kv_heads,
        BLOCK=BLOCK,
    )


def exact_slots(
    slots: torch.Tensor,
    indptr: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """List the slots of each request's prefix and tail, the row without its tape.

    slots: int32 [indptr[-1]], mutated. indptr: int32 [bs + 1] from 0, P + tail of each request.
    longest: the most of them. Where a budget is 0 all of the row is listed.
    """
    run = exact_slots_triton if slots.is_cuda else exact_slots_ref
    run(slots, indptr, tables, longest)


def exact_slots_triton(
    slots: torch.Tensor,
    indptr: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """`exact_slots` by the Triton kernel."""
    req_to_token, req_pool_indices, _, prefix_lens, budgets, _ = tables
    bs = len(req_pool_indices)
    assert indptr.shape == (bs + 1,), indptr.shape
    assert slots.dtype == indptr.dtype == req_to_token.dtype == torch.int32
    assert prefix_lens.dtype == budgets.dtype == torch.int32
    assert req_to_token.stride(1) == 1
    _write_slots[(bs, triton.cdiv(longest, BLOCK))](
        slots,
        indptr,
        req_to_token,
        req_pool_indices,
        prefix_lens,
        budgets,
        req_to_token.stride(0),
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["bs", "slots"])
def _write_pages(
    pages_ptr,
    starts_ptr,  # int64 [L, bs]
    req_to_token_ptr,
    req_pool_indices_ptr,
    prefix_lens_ptr,
    budgets_ptr,
    offsets_ptr,
    bs,
    slots,
    row_stride,
    offsets_stride,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.load(req_pool_indices_ptr + request).to(tl.int64)
    budget = tl.load(budgets_ptr + row)
    if budget == 0:
        return
    piece_ptr = offsets_ptr + row * offsets_stride + layer * H
    piece = tl.load(piece_ptr)
    count = tl.load(piece_ptr + H) - piece
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    place = piece + i
    position = tl.load(prefix_lens_ptr + row) + place % budget
    slot = tl.load(req_to_token_ptr + row * row_stride + position, mask=live, other=0)
    column = place // budget
    page = entry_place(column // H, slot.to(tl.int64), column % H, slots, H)
    start = tl.load(starts_ptr + layer * bs + request)
    tl.store(pages_ptr + start + i, page.to(tl.int32), mask=live)


@triton.jit
def _write_slots(
    slots_ptr,
    indptr_ptr,  # int32 [bs + 1]
    req_to_token_ptr,
    req_pool_indices_ptr,
    prefix_lens_ptr,
    budgets_ptr,
    row_stride,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    row = tl.load(req_pool_indices_ptr + request).to(tl.int64)
    budget = tl.load(budgets_ptr + row)
    prefix_len = tl.load(prefix_lens_ptr + row)
    start = tl.load(indptr_ptr + request)
    count = tl.load(indptr_ptr + request + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    position = tl.where(i < prefix_len, i, i + budget)
    slot = tl.load(req_to_token_ptr + row * row_stride + position, mask=live, other=0)
    tl.store(slots_ptr + start + i, slot, mask=live)
