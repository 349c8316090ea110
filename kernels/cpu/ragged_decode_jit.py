# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of ragged decode: prepare the work, attend to it, merge the parts.

numba compiles what is here; where its vectoriser falls short the LLVM IR is written out, so the
op needs no C++ compiler and runs on whatever vector unit the CPU has. All of it is in one file
because numba's disk cache watches only the file of the function that it caches.

Words: an *item* is up to ITEM_ENTRIES entries that one thread attends to, for all heads (rows that
they share: prefix and tail) or for one head (a tape piece); a *part* is the unnormalised output,
running maximum and sum of one (item, head). Items do not depend on the number of threads, so
neither does the result, to the bit. A *chunk* is the run of items that a thread takes at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

ITEM_ENTRIES = 256
BLOCK_ENTRIES = 64  # scores of a block stay in the first-level cache
AHEAD = 16  # entries between a prefetch and its use
PAD = 16  # blocks are padded to a multiple of this
CHUNK_ENTRIES = 2048  # fewer are not worth another thread
VALUE_UNROLL = 8
CACHE_LINE = 64
LOG2E = 1.4426950408889634

F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTE_POINTER = I8.as_pointer()
# exp2 on [-0.5, 0.5], minimax, relative error 1e-7 in float32.
EXP2 = (
    1.0000000005541683,
    0.6931472057372611,
    0.24022646890620494,
    0.05550328776973794,
    0.009618488958573116,
    0.0013399931216548045,
    0.0001534581161386254,
)


@functools.cache
def _target() -> tuple[str, frozenset[str]]:
    """Triple and features of the CPU that numba compiles for, which NUMBA_CPU_NAME may set."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, frozenset(features.split(","))


def converts_float16() -> bool:
    """Whether float16 is widened by an instruction; LLVM would call a function numba lacks."""
    triple, features = _target()
    return "+f16c" in features or not triple.startswith("x86")


def vector_lanes(head_dim: int) -> int:
    """float32 lanes of one vector operation."""
    has_avx512 = "+avx512f" in _target()[1]
    return 16 if has_avx512 and head_dim % 16 == 0 else 8


def splits_pairs(head_dim: int, is_bfloat16: bool) -> bool:
    """Whether rows are read as pairs: even elements of 2 x lanes first, then the odd ones.

    One 32-bit lane holds two bfloat16: a shift widens the even one, a mask the odd one.
    """
    return is_bfloat16 and head_dim % (2 * vector_lanes(head_dim)) == 0


def element_order(head_dim: int, is_bfloat16: bool) -> np.ndarray:
    """int64 [head_dim]: the element of a row that stands at each place of a widened row."""
    places = np.arange(head_dim, dtype=np.int64)
    if not splits_pairs(head_dim, is_bfloat16):
        return places
    return places.reshape(-1, vector_lanes(head_dim), 2).transpose(0, 2, 1).reshape(-1)


class Emit:
    """Writes vector IR at the builder's position. Vectors are float32 [lanes]."""

    def __init__(self, builder: Any, lanes: int):
        self.builder = builder
        self.lanes = lanes
        self.vector = ir.VectorType(F32, lanes)
        self.ints = ir.VectorType(I32, lanes)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [value] * self.lanes)

    def call(self, name: str, *arguments: Any) -> Any:
        """An LLVM intrinsic on vectors, such as llvm.fmuladd."""
        signature = ir.FunctionType(self.vector, [self.vector] * len(arguments))
        name = f"{name}.v{self.lanes}f32"
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, list(arguments))

    def fma(self, x: Any, y: Any, addend: Any) -> Any:
        return self.call("llvm.fmuladd", x, y, addend)

    def maximum(self, x: Any, y: Any) -> Any:
        return self.call("llvm.maxnum", x, y)

    def load(self, data: Any, index: Any, element: Any = F32, count: int = 0) -> Any:
        """`count` elements at data[index]; aligned to one element only."""
        kind = ir.VectorType(element, count or self.lanes)
        pointer = self.builder.gep(data, [index])
        loaded = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        loaded.align = {F32: 4, I32: 4, I8: 1}.get(element, 2)
        return loaded

    def store(self, vector: Any, data: Any, index: Any) -> None:
        pointer = self.builder.gep(data, [index])
        pointer = self.builder.bitcast(pointer, vector.type.as_pointer())
        self.builder.store(vector, pointer).align = 4

    def shuffle(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(x, y, mask)

    def splat(self, scalar: Any) -> Any:
        empty = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * self.lanes)

    def first(self, vector: Any) -> Any:
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def reduce(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """All lanes combined, in every lane."""
        half = self.lanes // 2
        while half:
            turned = [(lane + half) % self.lanes for lane in range(self.lanes)]
            vector = combine(vector, self.shuffle(vector, vector, turned))
            half //= 2
        return vector

    def sum_four(self, vectors: Sequence[Any]) -> Any:
        """The sums of four vectors, as one vector of four."""
        add, lanes = self.builder.fadd, self.lanes
        half, quarter = lanes // 2, lanes // 4
        low = [*range(half), *range(lanes, lanes + half)]
        high = [lane + half for lane in low]
        x, y, z, w = vectors
        xy = add(self.shuffle(x, y, low), self.shuffle(x, y, high))
        zw = add(self.shuffle(z, w, low), self.shuffle(z, w, high))
        starts = (0, half, lanes, lanes + half)
        low = [start + lane for start in starts for lane in range(quarter)]
        high = [lane + quarter for lane in low]
        sums = add(self.shuffle(xy, zw, low), self.shuffle(xy, zw, high))
        step = quarter // 2
        while step:
            turned = [lane - lane % quarter + (lane + step) % quarter for lane in range(lanes)]
            sums = add(sums, self.shuffle(sums, sums, turned))
            step //= 2
        return self.shuffle(sums, sums, [0, quarter, 2 * quarter, 3 * quarter])

    def exp2(self, x: Any) -> Any:
        """2**x for x <= 0; 2**-126 below that, which vanishes next to the maximum's 1."""
        builder = self.builder
        x = self.maximum(x, self.constant(-126.0))
        whole = self.call("llvm.nearbyint", x)
        rest = builder.fsub(x, whole)
        power = self.constant(EXP2[-1])
        for coefficient in reversed(EXP2[:-1]):
            power = self.fma(power, rest, self.constant(coefficient))
        exponent = builder.add(
            builder.fptosi(whole, self.ints), ir.Constant(self.ints, [127] * self.lanes)
        )
        scale = builder.shl(exponent, ir.Constant(self.ints, [23] * self.lanes))
        return builder.fmul(power, builder.bitcast(scale, self.vector))

    def prefetch(self, data: Any, index: Any, num_bytes: int) -> None:
        """Asks for the cache lines of data[index:], into the second level."""
        arguments = [BYTE_POINTER, I32, I32, I32]
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), arguments), "llvm.prefetch.p0"
        )
        start = self.builder.bitcast(self.builder.gep(data, [index]), BYTE_POINTER)
        read, level, data_cache = (ir.Constant(I32, value) for value in (0, 2, 1))
        for offset in range(0, num_bytes, CACHE_LINE):
            line = self.builder.gep(start, [I64(offset)])
            self.builder.call(function, [line, read, level, data_cache])

    def widen(self, storage: Any, data: Any, index: Any, pairs: bool) -> list[Any]:
        """Elements data[index:] as float32: one vector, or two where rows are read as pairs."""
        builder = self.builder
        if storage == types.float32:
            return [self.load(data, index)]
        if storage == types.int16:
            data = builder.bitcast(data, ir.HalfType().as_pointer())
            half = self.load(data, index, ir.HalfType())
            return [builder.fpext(half, self.vector)]
        if storage == types.uint8:
            return [self.widen_e4m3(self.load(data, index, I8))]
        shift = ir.Constant(self.ints, [16] * self.lanes)
        if not pairs:
            bits = builder.zext(self.load(data, index, I16), self.ints)
            return [builder.bitcast(builder.shl(bits, shift), self.vector)]
        bits = builder.bitcast(self.load(data, index, I16, 2 * self.lanes), self.ints)
        mask = ir.Constant(self.ints, [0xFFFF0000] * self.lanes)
        even, odd = builder.shl(bits, shift), builder.and_(bits, mask)
        return [builder.bitcast(even, self.vector), builder.bitcast(odd, self.vector)]

    def widen_e4m3(self, bytes_: Any) -> Any:
        """float8_e4m3fn as float32: exponent and mantissa where float32 has them, then the bias.

        A small number is a float32 below the normal range until the product. NaN becomes 480.
        """
        builder = self.builder

        def bits(mask: int, places: int) -> Any:
            masked = builder.and_(wide, ir.Constant(self.ints, [mask] * self.lanes))
            return builder.shl(masked, ir.Constant(self.ints, [places] * self.lanes))

        wide = builder.zext(bytes_, self.ints)
        number = builder.bitcast(builder.or_(bits(0x80, 24), bits(0x7F, 20)), self.vector)
        return builder.fmul(number, self.constant(2.0 ** (127 - 7)))


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return make_array(kind)(context, builder, value).data


@intrinsic(prefer_literal=True)
def score_block(
    typing: Any, query: Any, arena: Any, rows: Any, count: Any, heads: Any, scores: Any,
    head_dim: Any, group: Any,
) -> Any:  # fmt: skip
    """scores[head, g, i] = query[head, g] . arena[rows[i] + head * D :]; `count` is padded."""
    dim, size = head_dim.literal_value, group.literal_value
    intp = types.intp
    signature = types.void(query, arena, rows, intp, intp, scores, head_dim, group)
    lanes = vector_lanes(dim)
    pairs = splits_pairs(dim, arena.dtype == types.uint16)
    step = 2 * lanes if pairs else lanes
    row_bytes = dim * arena.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(builder, lanes)
        q, keys, row_data, out = (
            _data(context, builder, sig.args[place], arguments[place]) for place in (0, 1, 2, 5)
        )
        add, mul = builder.add, builder.mul
        with cgutils.for_range(builder, builder.sdiv(arguments[3], I64(4))) as quads:
            first = mul(quads.index, I64(4))
            with cgutils.for_range(builder, arguments[4]) as head:
                head_offset = mul(head.index, I64(dim))
                places = [add(first, I64(entry)) for entry in range(4)]
                for place in places:
                    later = builder.load(builder.gep(row_data, [add(place, I64(AHEAD))]))
                    emit.prefetch(keys, add(later, head_offset), row_bytes)
                starts = [
                    add(builder.load(builder.gep(row_data, [place])), head_offset)
                    for place in places
                ]
                for g0 in range(0, size, 4):
                    members = range(g0, min(size, g0 + 4))
                    sums: dict[tuple[int, int], Any] = {}
                    for d0 in range(0, dim, step):
                        wide = [
                            emit.widen(arena.dtype, keys, add(start, I64(d0)), pairs)
                            for start in starts
                        ]
                        for part in range(step // lanes):
                            for g in members:
                                at = mul(head.index, I64(size * dim))
                                at = add(at, I64(g * dim + d0 + part * lanes))
                                factor = emit.load(q, at)
                                for entry in range(4):
                                    term = wide[entry][part]
                                    so_far = sums.get((g, entry))
                                    sums[g, entry] = (
                                        builder.fmul(factor, term)
                                        if so_far is None
                                        else emit.fma(factor, term, so_far)
                                    )
                    for g in members:
                        at = mul(head.index, I64(size * BLOCK_ENTRIES))
                        at = add(at, add(first, I64(g * BLOCK_ENTRIES)))
                        emit.store(emit.sum_four([sums[g, entry] for entry in range(4)]), out, at)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def cap_block(typing: Any, scores: Any, count: Any, num_rows: Any, cap: Any, head_dim: Any) -> Any:
    """Turns scores (base 2) into cap * tanh(score / cap), row by row; `count` is padded."""
    intp = types.intp
    signature = types.void(scores, intp, intp, types.float32, head_dim)
    lanes = vector_lanes(head_dim.literal_value)

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(builder, lanes)
        data = _data(context, builder, sig.args[0], arguments[0])
        one, cap = emit.constant(1.0), emit.splat(arguments[3])
        # tanh(x) = (1 - t) / (1 + t) with t = exp(-2 x), x >= 0.
        to_exponent = builder.fdiv(emit.constant(-2 * LOG2E), cap)
        with cgutils.for_range(builder, arguments[2]) as row:
            base = builder.mul(row.index, I64(BLOCK_ENTRIES))
            with cgutils.for_range(builder, builder.sdiv(arguments[1], I64(lanes))) as step:
                at = builder.add(base, builder.mul(step.index, I64(lanes)))
                score = emit.load(data, at)
                power = emit.exp2(builder.fmul(emit.call("llvm.fabs", score), to_exponent))
                tanh = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
                capped = emit.call("llvm.copysign", builder.fmul(cap, tanh), score)
                emit.store(capped, data, at)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def softmax_block(
    typing: Any, scores: Any, count: Any, num_rows: Any, maxima: Any, sums: Any, outputs: Any,
    head_dim: Any,
) -> Any:  # fmt: skip
    """Turns scores (base 2) into weights, row by row; rescales the row's sum and output."""
    dim = head_dim.literal_value
    intp = types.intp
    signature = types.void(scores, intp, intp, maxima, sums, outputs, head_dim)
    lanes = vector_lanes(dim)

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(builder, lanes)
        score_data, max_data, sum_data, out = (
            _data(context, builder, sig.args[place], arguments[place]) for place in (0, 3, 4, 5)
        )
        add, mul = builder.add, builder.mul
        vectors = builder.sdiv(arguments[1], I64(lanes))
        running = cgutils.alloca_once(builder, emit.vector)
        with cgutils.for_range(builder, arguments[2]) as row:
            base = mul(row.index, I64(BLOCK_ENTRIES))
            old = emit.splat(builder.load(builder.gep(max_data, [row.index])))
            builder.store(old, running)
            with cgutils.for_range(builder, vectors) as step:
                at = add(base, mul(step.index, I64(lanes)))
                highest = emit.maximum(builder.load(running), emit.load(score_data, at))
                builder.store(highest, running)
            new = emit.reduce(builder.load(running), emit.maximum)
            decay = emit.exp2(builder.fsub(old, new))
            builder.store(emit.constant(0.0), running)
            with cgutils.for_range(builder, vectors) as step:
                at = add(base, mul(step.index, I64(lanes)))
                weight = emit.exp2(builder.fsub(emit.load(score_data, at), new))
                emit.store(weight, score_data, at)
                builder.store(builder.fadd(builder.load(running), weight), running)
            total = emit.first(emit.reduce(builder.load(running), builder.fadd))
            sum_at = builder.gep(sum_data, [row.index])
            kept = builder.fmul(builder.load(sum_at), emit.first(decay))
            builder.store(builder.fadd(kept, total), sum_at)
            builder.store(emit.first(new), builder.gep(max_data, [row.index]))
            for d0 in range(0, dim, lanes):
                at = add(mul(row.index, I64(dim)), I64(d0))
                emit.store(builder.fmul(emit.load(out, at), decay), out, at)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def value_block(
    typing: Any, outputs: Any, arena: Any, rows: Any, count: Any, heads: Any, value_offset: Any,
    weights: Any, head_dim: Any, group: Any,
) -> Any:  # fmt: skip
    """outputs[head, g] += weights[head, g, i] * arena[rows[i] + value_offset + head * D :]."""
    dim, size = head_dim.literal_value, group.literal_value
    intp = types.intp
    signature = types.void(outputs, arena, rows, intp, intp, intp, weights, head_dim, group)
    lanes = vector_lanes(dim)
    pairs = splits_pairs(dim, arena.dtype == types.uint16)
    step = 2 * lanes if pairs else lanes
    registers = 16 if lanes == 16 else 10  # accumulators of a tile, the rest is for operands
    tile_group = min(size, 8)
    tile_dims = step * max(1, registers * lanes // (tile_group * step))
    row_bytes = arena.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(builder, lanes)
        out, values, row_data, weight_data = (
            _data(context, builder, sig.args[place], arguments[place]) for place in (0, 1, 2, 6)
        )
        add, mul = builder.add, builder.mul
        with cgutils.for_range(builder, builder.sdiv(arguments[3], I64(VALUE_UNROLL))) as runs:
            first = mul(runs.index, I64(VALUE_UNROLL))
            with cgutils.for_range(builder, arguments[4]) as head:
                offset = add(arguments[5], mul(head.index, I64(dim)))
                out_base = mul(head.index, I64(size * dim))
                weight_base = add(mul(head.index, I64(size * BLOCK_ENTRIES)), first)
                for g0 in range(0, size, tile_group):
                    members = range(g0, min(size, g0 + tile_group))
                    for d0 in range(0, dim, tile_dims):
                        dims = range(d0, min(dim, d0 + tile_dims), lanes)
                        tile = {
                            (g, d): emit.load(out, add(out_base, I64(g * dim + d)))
                            for g in members
                            for d in dims
                        }
                        for entry in range(VALUE_UNROLL):
                            place = add(first, I64(entry))
                            if g0 == 0:
                                later = builder.gep(row_data, [add(place, I64(AHEAD))])
                                later = add(add(builder.load(later), offset), I64(d0))
                                emit.prefetch(values, later, len(dims) * lanes * row_bytes)
                            start = builder.load(builder.gep(row_data, [place]))
                            start = add(start, offset)
                            wide = [
                                vector
                                for d in dims[:: step // lanes]
                                for vector in emit.widen(
                                    arena.dtype, values, add(start, I64(d)), pairs
                                )
                            ]
                            for g in members:
                                at = add(weight_base, I64(g * BLOCK_ENTRIES + entry))
                                weight = builder.load(builder.gep(weight_data, [at]))
                                weight = emit.splat(weight)
                                for d, term in zip(dims, wide, strict=True):
                                    tile[g, d] = emit.fma(weight, term, tile[g, d])
                        for (g, d), vector in tile.items():
                            emit.store(vector, out, add(out_base, I64(g * dim + d)))
        return context.get_dummy_value()

    return signature, generate


# Columns of the item table.
REQUEST, ON_TAPE, FIRST_HEAD, NUM_HEADS, BEGIN, END, FIRST_PART, NUM_COLUMNS = range(8)
# BEGIN and END count places of the tape, or exact entries: those of the prefix, then of the tail.


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles on the first call, without the GIL at run time.

    The machine code is kept in numba's cache directory (NUMBA_CACHE_DIR, else beside this file,
    else the user's cache directory), or not at all where none of them can be written.
    """
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no such directory
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def _plan_items(
    layer, num_heads, sliding_window, requests, seq_lens, prefix_lens, budgets, offsets
):
    """The item table, request by request, and each request's first item.

    Tape pieces are cut where their slots pass a multiple of ITEM_ENTRIES, and all heads' items on
    the same slots follow each other: a slot's heads are neighbours in memory. What a sliding window
    leaves of a prefix before a tape depends on the head's piece, so each head has items of its own.
    """
    batch = requests.shape[0]
    first_head = layer * num_heads
    most = 0  # items: the cuts at column ends come on top
    for r in range(batch):
        row, budget = requests[r], budgets[requests[r]]
        most += -(-(seq_lens[r] - budget) // ITEM_ENTRIES)
        if budget > 0:
            tape = offsets[row, first_head + num_heads] - offsets[row, first_head]
            most += -(-budget // ITEM_ENTRIES) * (num_heads + tape // budget + 1)
            if sliding_window > 0:
                most += -(-prefix_lens[row] // ITEM_ENTRIES) * num_heads + 1
    items = np.empty((most, NUM_COLUMNS), np.int64)
    first_item = np.zeros(batch + 1, np.int64)
    item = 0
    part = 0
    for r in range(batch):
        row, budget = requests[r], np.int64(budgets[requests[r]])
        exact = seq_lens[r] - budget
        first = 0  # exact entry for all heads
        if sliding_window > 0:
            first = max(0, exact - sliding_window)
            if budget > 0:
                prefix_len = np.int64(prefix_lens[row])
                first = max(first, prefix_len)
                for head in range(num_heads):
                    begin = np.int64(offsets[row, first_head + head])
                    end = np.int64(offsets[row, first_head + head + 1])
                    skipped = max(0, exact + end - begin - sliding_window)
                    for start in range(min(skipped, prefix_len), prefix_len, ITEM_ENTRIES):
                        stop = min(prefix_len, start + ITEM_ENTRIES)
                        _fill(items[item], r, 0, head, 1, start, stop, part)
                        item += 1
                        part += 1
        for start in range(first, exact, ITEM_ENTRIES):
            _fill(items[item], r, 0, 0, num_heads, start, min(exact, start + ITEM_ENTRIES), part)
            item += 1
            part += num_heads
        for cell in range(0, budget, ITEM_ENTRIES):
            for head in range(num_heads):
                begin = np.int64(offsets[row, first_head + head])
                end = np.int64(offsets[row, first_head + head + 1])
                if sliding_window > 0:
                    # Behind the piece comes the tail.
                    tail = exact - prefix_lens[row]
                    begin = min(end, max(begin, end - max(0, sliding_window - tail)))
                for column in range(begin - begin % budget, end, budget):
                    low = max(begin, column + cell)
                    high = min(end, column + min(budget, cell + ITEM_ENTRIES))
                    if low < high:
                        _fill(items[item], r, 1, head, 1, low, high, part)
                        item += 1
                        part += 1
        first_item[r + 1] = item
    return items[:item], first_item, part


@_compiled
def _fill(item, request, on_tape, head, num_heads, begin, end, part):
    item[REQUEST] = request
    item[ON_TAPE] = on_tape
    item[FIRST_HEAD] = head
    item[NUM_HEADS] = num_heads
    item[BEGIN] = begin
    item[END] = end
    item[FIRST_PART] = part


@_compiled
def _share_items(items, max_chunks):
    """First item of each chunk, so that all chunks hold about as many entries."""
    total = 0
    for item in items:
        total += (item[END] - item[BEGIN]) * item[NUM_HEADS]
    num_chunks = max(1, min(max_chunks, total // CHUNK_ENTRIES))
    first = np.full(num_chunks + 1, items.shape[0], np.int64)
    first[0] = 0
    seen = 0
    chunk = 1
    for index in range(items.shape[0]):
        while chunk < num_chunks and seen * num_chunks >= total * chunk:
            first[chunk] = index
            chunk += 1
        seen += (items[index, END] - items[index, BEGIN]) * items[index, NUM_HEADS]
    return first


@_compiled
def prepare(
    query, scale, order, layer, num_heads, sliding_window, requests, seq_lens, prefix_lens, budgets,
    offsets, max_chunks,
):  # fmt: skip
    """The work of one call: items, first items of requests and chunks, queries, empty parts.

    query: float32 [batch, num_qo_heads * D]; returned flat, times `scale`, elements in `order`.
    Parts: maxima and sums float32 [parts * group], outputs float32 [parts * group * D], flat.
    """
    items, first_of_request, num_parts = _plan_items(
        layer, num_heads, sliding_window, requests, seq_lens, prefix_lens, budgets, offsets
    )
    first_of_chunk = _share_items(items, max_chunks)
    head_dim = order.shape[0]
    batch, width = query.shape
    ordered = np.empty(batch * width, np.float32)
    for r in range(batch):
        for head in range(0, width, head_dim):
            for d in range(head_dim):
                ordered[r * width + head + d] = query[r, head + order[d]] * scale
    num_rows = num_parts * (width // (num_heads * head_dim))
    maxima = np.full(num_rows, -np.inf, np.float32)
    sums = np.zeros(num_rows, np.float32)
    outputs = np.zeros(num_rows * head_dim, np.float32)
    return items, first_of_request, first_of_chunk, ordered, maxima, sums, outputs


@_compiled
def _find_rows(item, slots, prefix_len, budget, layer, num_heads, num_slots, head_dim, rows):
    """rows[i] = arena element where the K row of the item's entry i starts. Pads with the last.

    Exact rows start at the item's first head of `layer`; a tape place names its own layer and head.
    """
    row_size = num_heads * head_dim
    count = item[END] - item[BEGIN]
    if not item[ON_TAPE]:
        first_head = item[FIRST_HEAD] * head_dim
        for i in range(count):
            place = item[BEGIN] + i
            if place >= prefix_len:
                place += budget
            rows[i] = (2 * layer * num_slots + slots[place]) * row_size + first_head
    else:
        head, column = item[BEGIN] // budget, item[BEGIN] % budget
        for i in range(count):
            slot = 2 * (head // num_heads) * num_slots + slots[prefix_len + column + i]
            rows[i] = slot * row_size + head % num_heads * head_dim
    for i in range(count, rows.shape[0]):
        rows[i] = rows[count - 1]


@functools.cache
def attend_kernel(head_dim: int, group: int) -> Callable[..., None]:
    """The compiled loop over items [first, last) for one head shape. Writes their parts."""

    def attend(
        first, last, items, query, arena, layer, num_heads, num_slots, req_to_token, requests,
        prefix_lens, budgets, logit_cap, maxima, sums, outputs,
    ):  # fmt: skip
        width = num_heads * group * head_dim
        value_offset = num_slots * num_heads * head_dim
        scores = np.empty(num_heads * group * BLOCK_ENTRIES, np.float32)
        rows = np.empty(ITEM_ENTRIES + AHEAD, np.int64)
        for index in range(first, last):
            item = items[index]
            row = requests[item[REQUEST]]
            _find_rows(
                item, req_to_token[row], prefix_lens[row], budgets[row], layer, num_heads,
                num_slots, head_dim, rows,
            )  # fmt: skip
            heads = item[NUM_HEADS]
            part = item[FIRST_PART] * group
            item_query = query[item[REQUEST] * width + item[FIRST_HEAD] * group * head_dim :]
            item_outputs = outputs[part * head_dim :]
            for begin in range(0, item[END] - item[BEGIN], BLOCK_ENTRIES):
                count = min(BLOCK_ENTRIES, item[END] - item[BEGIN] - begin)
                padded = -(-count // PAD) * PAD
                block = rows[begin:]
                score_block(item_query, arena, block, padded, heads, scores, head_dim, group)
                if logit_cap > 0:
                    cap_block(scores, padded, heads * group, logit_cap, head_dim)
                for line in range(heads * group):
                    for i in range(count, padded):
                        scores[line * BLOCK_ENTRIES + i] = -np.inf
                softmax_block(
                    scores, padded, heads * group, maxima[part:], sums[part:], item_outputs,
                    head_dim,
                )  # fmt: skip
                value_block(
                    item_outputs, arena, block, padded, heads, value_offset, scores, head_dim,
                    group,
                )  # fmt: skip

    return _compiled(attend)


@_compiled
def merge(items, first_of_request, num_heads, group, order, maxima, sums, outputs, out):
    """out[r, head, g, order] = softmax over all parts of (r, head), in order of items.

    out: float32 [batch, num_qo_heads * D], mutated; zeros where a request has no entry.
    """
    head_dim = order.shape[0]
    merged = np.empty(num_heads * group * head_dim, np.float32)
    highest = np.empty(num_heads * group, np.float32)
    total = np.empty(num_heads * group, np.float32)
    for r in range(out.shape[0]):
        of_request = items[first_of_request[r] : first_of_request[r + 1]]
        highest[:] = -np.inf
        total[:] = 0
        merged[:] = 0
        for item in of_request:
            line = item[FIRST_HEAD] * group
            for i in range(item[NUM_HEADS] * group):
                part = item[FIRST_PART] * group + i
                highest[line + i] = max(highest[line + i], maxima[part])
        for item in of_request:
            line = item[FIRST_HEAD] * group
            for i in range(item[NUM_HEADS] * group):
                part = item[FIRST_PART] * group + i
                weight = np.exp2(maxima[part] - highest[line + i])
                total[line + i] += weight * sums[part]
                for d in range(head_dim):
                    merged[(line + i) * head_dim + d] += weight * outputs[part * head_dim + d]
        for line in range(num_heads * group):
            inverse = 1 / total[line] if total[line] > 0 else np.float32(0)
            for d in range(head_dim):
                out[r, line * head_dim + order[d]] = merged[line * head_dim + d] * inverse
