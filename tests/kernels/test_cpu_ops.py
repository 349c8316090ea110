# SPDX-License-Identifier: Apache-2.0
"""The CPU ops against loops that follow the definitions entry by entry."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.cpu import extend
from lava_sglang.kernels.cpu.extend import extend_cpu
from lava_sglang.kernels.cpu.ragged_decode import compile_ragged_decode, ragged_decode_cpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
K_SCALE, V_SCALE = 0.375, 2.5  # of fp8 entries
# Outputs are rounded to the dtype; inside, all arithmetic is float32.
TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}


@dataclass
class Tape:
    """A pool with requests on it; row 0 is the padding row."""

    num_layers: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    max_context: int = 1024
    rows: int = 40
    sliding_window: int = 0
    logit_cap: float = 0.0
    seq_lens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        slots = 1 + self.rows * self.max_context
        shape = (self.num_layers, 2, slots, self.num_kv_heads, self.head_dim)
        self.arena = torch.randn(shape, generator=self.generator).to(self.dtype)
        is_fp8 = self.dtype == E4M3
        self.k_scale, self.v_scale = (K_SCALE, V_SCALE) if is_fp8 else (1.0, 1.0)
        self.q_dtype = FP32 if is_fp8 else self.dtype
        self.free = 1 + torch.randperm(slots - 1, generator=self.generator)
        self.req_to_token = torch.zeros(self.rows, self.max_context, dtype=torch.int32)
        self.prefix_lens = torch.zeros(self.rows, dtype=torch.int32)
        self.budgets = torch.zeros(self.rows, dtype=torch.int32)
        columns = self.num_layers * self.num_kv_heads
        self.offsets = torch.zeros(self.rows, columns + 1, dtype=torch.int32)
        self.seq_lens.append(1)  # the padding row

    def add(self, seq_len: int) -> int:
        """An uncompressed request; its row."""
        row = len(self.seq_lens)
        self.req_to_token[row, :seq_len] = self.free[:seq_len].int()
        self.free = self.free[seq_len:]
        self.seq_lens.append(seq_len)
        return row

    def add_compressed(self, prefix_len: int, kept: list[int], tail: int) -> int:
        """A request that keeps kept[layer * num_kv_heads + head] entries of each head."""
        budget, rest = divmod(sum(kept), self.num_layers * self.num_kv_heads)
        assert rest == 0 and len(kept) == self.num_layers * self.num_kv_heads
        row = self.add(prefix_len + budget + tail)
        self.prefix_lens[row] = prefix_len
        self.budgets[row] = budget
        self.offsets[row, 1:] = torch.tensor(kept).cumsum(0).int()
        return row

    def random_kept(self, budget: int) -> list[int]:
        """Uneven counts whose mean is `budget`."""
        heads = self.num_layers * self.num_kv_heads
        cuts = torch.randint(0, heads * budget + 1, (heads - 1,), generator=self.generator)
        edges = [0, *cuts.sort().values.tolist(), heads * budget]
        return [end - begin for begin, end in pairwise(edges)]

    def queries(self, batch: int) -> torch.Tensor:
        shape = (batch, self.num_kv_heads * self.group, self.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.q_dtype)

    def decode(self, q: torch.Tensor, rows: list[int], layer: int) -> torch.Tensor:
        return ragged_decode_cpu(
            q,
            self.arena,
            layer,
            BatchTables(
                self.req_to_token,
                torch.tensor(rows),
                torch.tensor([self.seq_lens[row] for row in rows]),
                self.prefix_lens,
                self.budgets,
                self.offsets,
            ),
            self.head_dim**-0.5,
            torch.full_like(q, math.nan),
            sliding_window=self.sliding_window,
            logit_cap=self.logit_cap,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )

    def entries(self, row: int, layer: int, head: int) -> Iterator[tuple[int, int, int]]:
        """(layer, slot, head) of each entry that a head reads, by the definition of the tape."""
        slots = self.req_to_token[row].tolist()
        prefix_len, budget = int(self.prefix_lens[row]), int(self.budgets[row])
        if budget == 0:
            prefix_len = 0
        for slot in slots[:prefix_len]:
            yield layer, slot, head
        column = layer * self.num_kv_heads + head
        if budget > 0:
            for place in range(self.offsets[row, column], self.offsets[row, column + 1]):
                home, inside = divmod(int(place), self.num_kv_heads * budget)
                home_head, position = divmod(inside, budget)
                yield home, slots[prefix_len + position], home_head
        for slot in slots[prefix_len + budget : self.seq_lens[row]]:
            yield layer, slot, head

    def oracle(self, q: torch.Tensor, rows: list[int], layer: int) -> torch.Tensor:
        """float64, one head at a time."""
        out = torch.empty(q.shape, dtype=torch.float64)
        for place, row in enumerate(rows):
            for head in range(self.num_kv_heads):
                entries = [*self.entries(row, layer, head)][-self.sliding_window :]
                homes, slots, heads = zip(*entries, strict=True)
                k = self.arena[list(homes), 0, list(slots), list(heads)].double() * self.k_scale
                v = self.arena[list(homes), 1, list(slots), list(heads)].double() * self.v_scale
                for g in range(head * self.group, (head + 1) * self.group):
                    logits = k @ q[place, g].double() * self.head_dim**-0.5
                    if self.logit_cap:
                        logits = self.logit_cap * (logits / self.logit_cap).tanh()
                    out[place, g] = logits.softmax(0) @ v
        return out

    def check(self, rows: list[int], layer: int) -> None:
        q = self.queries(len(rows))
        out = self.decode(q, rows, layer)
        expected = self.oracle(q, rows, layer)
        assert out.dtype == self.q_dtype
        tolerance = TOLERANCE[self.q_dtype] * self.v_scale
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Every dtype, head dim and group; not their product, as each pair of the last two is compiled.
SHAPES = [(64, 3), (80, 1), (128, 4), (64, 8), (96, 5), (256, 16), (72, 2)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, E4M3], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), SHAPES)
def test_mixed_batch(head_dim: int, group: int, dtype: torch.dtype) -> None:
    if (head_dim, group) in SHAPES[4:] and dtype == FP16:
        dtype = BF16
    tape = Tape(2, 2, group, head_dim, dtype, max_context=700, rows=6)
    rows = [
        tape.add(1),
        tape.add(333),
        tape.add_compressed(100, tape.random_kept(150), 9),
        tape.add_compressed(0, [0, 4 * 128, 0, 0], 1),
        0,
    ]
    for layer in range(2):
        tape.check(rows, layer)


@pytest.mark.parametrize("sliding_window", [1, 2, 17, 64, 65, 256, 300, 600, 900])
def test_sliding_window(sliding_window: int) -> None:
    """It ends in the tail, in a piece and in a prefix; heads' pieces differ in length."""
    tape = Tape(2, 2, 3, 64, FP32, max_context=900, rows=8, sliding_window=sliding_window)
    rows = [
        tape.add(1),
        tape.add(333),
        tape.add(850),
        tape.add_compressed(300, tape.random_kept(280), 16),
        tape.add_compressed(0, [0, 4 * 128, 0, 0], 64),
        tape.add_compressed(290, [4 * 100, 0, 0, 0], 1),
        0,
    ]
    for layer in range(2):
        tape.check(rows, layer)


@pytest.mark.parametrize("cap", [0.5, 5, 50])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP32), (256, BF16), (72, FP32)], ids=str)
def test_logit_cap(head_dim: int, dtype: torch.dtype, cap: float) -> None:
    tape = Tape(2, 2, 3, head_dim, dtype, rows=5, sliding_window=100, logit_cap=cap)
    rows = [tape.add(1), tape.add(150), tape.add_compressed(50, tape.random_kept(150), 9)]
    tape.check(rows, 0)
    tape.sliding_window = 0
    tape.check(rows, 1)


def test_every_e4m3_number() -> None:
    """Each request has one entry, so its output is that entry's V. 480 stands for NaN."""
    tape = Tape(1, 1, 1, 64, E4M3, rows=5)
    rows = [tape.add(1) for _ in range(4)]
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    slots = tape.req_to_token[rows, 0].long()
    tape.arena.view(torch.uint8)[0, 1, slots, 0] = codes
    want = codes.view(E4M3).float() * V_SCALE
    want = want.where(~want.isnan(), torch.where(codes < 128, 480.0, -480.0) * V_SCALE)
    got = tape.decode(torch.zeros(4, 1, 64), rows, 0)[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_empty_piece_one_entry_and_head_with_everything() -> None:
    tape = Tape(3, 2, 3, 64, FP32, rows=5)
    rows = [
        tape.add_compressed(17, [0, 0, 6 * 200, 0, 0, 0], 1),
        tape.add_compressed(17, [1, 1, 1, 1, 1, 1], 1),
        tape.add_compressed(0, [1, 0, 2, 3, 0, 6 * 100 - 6], 300),
    ]
    for layer in range(3):
        tape.check(rows, layer)


def test_equal_budgets_read_the_stock_layout() -> None:
    tape = Tape(2, 3, 3, 64, FP32, rows=4)
    compressed = tape.add_compressed(40, [100] * 6, 7)
    stock = tape.add(147)
    tape.req_to_token[stock] = tape.req_to_token[compressed]
    q = tape.queries(1)
    torch.testing.assert_close(
        tape.decode(q, [compressed], 1), tape.decode(q, [stock], 1), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("tail", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 513])
def test_lengths_around_the_block_sizes(tail: int) -> None:
    tape = Tape(1, 2, 3, 64, FP32, max_context=1100, rows=4)
    tape.check([tape.add(tail), tape.add_compressed(5, [tail, tail], tail)], 0)


def test_large_batch() -> None:
    tape = Tape(2, 3, 3, 64, BF16, max_context=400, rows=33)
    rows = [
        tape.add_compressed(i, tape.random_kept(20 + 5 * i), 1 + i)
        if i % 2
        else tape.add(1 + 11 * i)
        for i in range(32)
    ]
    tape.check(rows, 1)


def test_large_logits_do_not_overflow() -> None:
    tape = Tape(1, 1, 1, 64, FP32, rows=3)
    row = tape.add(700)
    q = tape.queries(1) * 1e4
    torch.testing.assert_close(
        tape.decode(q, [row], 0).double(), tape.oracle(q, [row], 0), rtol=1e-4, atol=1e-4
    )


def test_batch_without_entries_gives_zeros() -> None:
    tape = Tape(1, 2, 3, 64, FP32, rows=3)
    tape.seq_lens[0] = 0
    assert tape.decode(tape.queries(2), [0, 0], 0).eq(0).all()


def test_same_bits_for_any_number_of_threads_and_every_time() -> None:
    tape = Tape(2, 3, 3, 64, BF16, rows=20)
    rows = [tape.add(900) for _ in range(8)]
    rows += [tape.add_compressed(50, tape.random_kept(400), 30) for _ in range(8)]
    q = tape.queries(len(rows)).float()  # a float32 output hides nothing
    torch.set_num_threads(1)
    alone = tape.decode(q, rows, 1)
    for num_threads in (2, 3, 8):
        torch.set_num_threads(num_threads)
        for _ in range(5):
            assert torch.equal(tape.decode(q, rows, 1), alone)


def test_request_does_not_depend_on_its_batch() -> None:
    tape = Tape(2, 3, 3, 64, BF16, rows=12)
    rows = [tape.add(900) for _ in range(5)] + [tape.add_compressed(9, tape.random_kept(99), 3)]
    q = tape.queries(len(rows)).float()
    together = tape.decode(q, rows, 0)
    for place, row in enumerate(rows):
        assert torch.equal(tape.decode(q[place : place + 1], [row], 0)[0], together[place])


def _decode_in_child(tape: Tape, q: torch.Tensor, rows: list[int], queue: Any) -> None:
    queue.put(tape.decode(q, rows, 0).tolist())


def test_runs_in_a_forked_child() -> None:
    torch.set_num_threads(2)
    tape = Tape(1, 3, 3, 64, BF16, rows=10)
    rows = [tape.add(900) for _ in range(8)]
    q = tape.queries(8).float()
    expected = tape.decode(q, rows, 0)  # starts the threads that the child will not have
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_decode_in_child, args=(tape, q, rows, queue), daemon=True)
    child.start()
    assert queue.get(timeout=60) == expected.tolist()
    child.join(timeout=60)
    assert child.exitcode == 0


def test_bad_arguments_are_named() -> None:
    tape = Tape(1, 2, 3, 64, FP32, rows=3)
    row = tape.add(5)
    with pytest.raises(ValueError, match=r"num_qo_heads 5: accepted are 1 to 16 times"):
        tape.decode(tape.queries(1)[:, :5], [row], 0)
    with pytest.raises(ValueError, match=r"arena .*: accepted is a contiguous"):
        tape.decode(tape.queries(1)[:, :, :56], [row], 0)
    with pytest.raises(ValueError, match=r"arena.dtype torch.float64: accepted are"):
        compile_ragged_decode(6, 2, 64, torch.float64)
    with pytest.raises(ValueError, match=r"head_dim 60: accepted are multiples of 8"):
        compile_ragged_decode(6, 2, 60, FP32)
    tape.offsets = tape.offsets[:, :-1]
    with pytest.raises(ValueError, match=r"offsets.shape \(3, 2\): accepted is \[rows, 3\]"):
        tape.decode(tape.queries(1), [row], 0)
    tape.req_to_token = tape.req_to_token.long()
    with pytest.raises(ValueError, match=r"req_to_token.dtype torch.int64: accepted"):
        tape.decode(tape.queries(1), [row], 0)


def extend_oracle(
    q: torch.Tensor, tape: Tape, rows: list[int], prefix_lens: list[int], extend_lens: list[int]
) -> torch.Tensor:
    """float64, one new token at a time, layer 0."""
    out = torch.empty(q.shape, dtype=torch.float64)
    token = 0
    for row, prefix_len, extend_len in zip(rows, prefix_lens, extend_lens, strict=True):
        for position in range(prefix_len, prefix_len + extend_len):
            slots = tape.req_to_token[row, : position + 1].long()
            k = tape.arena[0, 0, slots].double() * tape.k_scale
            v = tape.arena[0, 1, slots].double() * tape.v_scale
            heads = q[token].double().view(tape.num_kv_heads, tape.group, tape.head_dim)
            logits = torch.einsum("hgd,nhd->hgn", heads, k) * tape.head_dim**-0.5
            if tape.sliding_window:
                logits[:, :, : -tape.sliding_window] = -math.inf
            if tape.logit_cap:
                logits = tape.logit_cap * (logits / tape.logit_cap).tanh()
                logits[:, :, : -(tape.sliding_window or position + 1)] = -math.inf
            out[token] = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), v).flatten(0, 1)
            token += 1
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, E4M3], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (64, 3), (80, 4), (128, 8), (256, 16)])
def test_extend(head_dim: int, group: int, dtype: torch.dtype) -> None:
    check_extend(Tape(1, 2, group, head_dim, dtype, max_context=300, rows=7))


@pytest.mark.parametrize("dtype", [FP32, E4M3], ids=str)
@pytest.mark.parametrize("sliding_window", [0, 1, 2, 60, 128, 300])
@pytest.mark.parametrize("cap", [0.0, 0.5, 50])
def test_extend_in_blocks(
    cap: float, sliding_window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extend, "BLOCK_QUERIES", 50)
    tape = Tape(1, 2, 3, 64, dtype, max_context=300, rows=7)
    tape.sliding_window, tape.logit_cap = sliding_window, cap
    check_extend(tape)


def check_extend(tape: Tape) -> None:
    prefix_lens, extend_lens = [0, 0, 1, 37, 200, 65], [1, 129, 1, 70, 0, 1]
    seq_lens = [p + e for p, e in zip(prefix_lens, extend_lens, strict=True)]
    rows = [tape.add(seq_len) for seq_len in seq_lens]
    q = tape.queries(sum(extend_lens))
    out = extend_cpu(
        q,
        tape.arena[0, 0],
        tape.arena[0, 1],
        tape.req_to_token,
        torch.tensor(rows),
        torch.tensor(seq_lens),
        prefix_lens,
        torch.tensor(extend_lens),
        tape.head_dim**-0.5,
        torch.full_like(q, math.nan),
        sliding_window=tape.sliding_window,
        logit_cap=tape.logit_cap,
        k_scale=tape.k_scale,
        v_scale=tape.v_scale,
    )
    expected = extend_oracle(q, tape, rows, prefix_lens, extend_lens)
    # Two parts, each rounded to the dtype before the merge.
    tolerance = 2 * TOLERANCE[tape.q_dtype] * tape.v_scale
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_extend_checks_the_lengths() -> None:
    tape = Tape(1, 2, 3, 64, FP32, rows=3)
    row = tape.add(9)
    q = tape.queries(4)
    k, v = tape.arena[0]

    def run(seq_len: int, prefix_len: int, extend_len: int) -> torch.Tensor:
        return extend_cpu(
            q, k, v, tape.req_to_token, torch.tensor([row]), [seq_len], [prefix_len], [extend_len],
            0.125, torch.empty_like(q),
        )  # fmt: skip

    assert run(9, 5, 4).isfinite().all()
    with pytest.raises(ValueError, match=r"seq_lens 9: accepted is .*, 4 \+ 4"):
        run(9, 4, 4)
    with pytest.raises(ValueError, match=r"extend_seq_lens sum to 3: accepted is q.shape\[0\], 4"):
        run(8, 5, 3)
