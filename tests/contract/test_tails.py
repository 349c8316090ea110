# SPDX-License-Identifier: Apache-2.0
"""Long answers: the tape is chosen again from itself and the answer. On real pools and rows."""

from typing import Any, NamedTuple

import pytest
import torch

from lava_sglang.attention import device_state
from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.kernels.reference import importance_ref, window_attention_ref
from lava_sglang.managers.request import LavaReq
from lava_sglang.policy import method_of
from tests.contract.engine import KV_HEADS, NUM_LAYERS, SCALING, Engine, build_engine, running_batch

pytestmark = pytest.mark.usefixtures("runtime_context")

WINDOW = 4
INTERVAL = 20


def tails(method: str = "lava", **settings: Any) -> KVCompressionConfig:
    values = {"budget": 0.25, "min_tokens": 16, "window_size": WINDOW, **settings}
    return KVCompressionConfig(method=method, decode_interval=INTERVAL, **values)


class Head(NamedTuple):
    """What one head attends to, in the row's order: exact prefix, tape piece, tail."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: list[int]


def read(engine: Engine, req: LavaReq, layer: int, head: int) -> Head:
    """Through the tables that the backends read. An entry of the engine says its own position."""
    assert req.plan is not None and req.budget is not None
    row, prefix_len, budget = engine.row(req), req.plan.shared_prefix_len, req.budget
    column = layer * KV_HEADS + head
    first, end = engine.tape.offsets[req.kv.req_pool_idx, column : column + 2].tolist()
    kv = [engine.pool.arena[layer, :, slot, head] for slot in row[:prefix_len]]
    for place in range(first, end):
        owner, slot = place // budget, row[prefix_len + place % budget]
        kv.append(engine.pool.arena[owner // KV_HEADS, :, slot, owner % KV_HEADS])
    kv += [engine.pool.arena[layer, :, slot, head] for slot in row[prefix_len + budget :]]
    keys, values = torch.stack(kv, dim=1)
    assert (keys[:, 0] == layer + 1).all() and (keys[:, 1] == head + 1).all(), "another's entry"
    return Head(keys, values, (keys[:, 2] - 1).int().tolist())


def heads_of(engine: Engine, req: LavaReq) -> list[list[Head]]:
    return [
        [read(engine, req, layer, head) for head in range(KV_HEADS)] for layer in range(NUM_LAYERS)
    ]


def expected(engine: Engine, req: LavaReq, before: list[list[Head]]) -> list[list[set[int]]]:
    """Positions that each head keeps of its tape and tail, one head at a time, nothing padded."""
    assert req.plan is not None
    method, prefix_len = method_of(req.compression), req.plan.shared_prefix_len
    end = len(req.origin_input_ids) + len(req.output_ids) - 1
    kept = []
    for layer, heads in enumerate(before):
        options = method.score_options(WINDOW, torch.device("cpu"))
        queries = engine.queries(req, end - WINDOW, end, layer)
        group = queries.shape[1] // KV_HEADS
        scores = []
        for head, (keys, values, _) in enumerate(heads):
            attention = window_attention_ref(
                queries[:, head * group : (head + 1) * group],
                keys[:, None],
                SCALING,
                query_weights=options.query_weights,
                root_mean_square=options.root_mean_square,
            )
            scored = slice(prefix_len, len(keys) - WINDOW)
            scores.append(importance_ref(attention[:, scored], values[scored, None], options)[0])
        # The tail's slots, and of what the piece held as many places as before.
        counts = [len(h.positions) - prefix_len - req.tail_len - WINDOW for h in heads]
        if not method.heads_compete:
            best = [
                score.sort(descending=True, stable=True).indices[:count]
                for score, count in zip(scores, counts, strict=True)
            ]
        else:
            flat = torch.cat(scores).sort(descending=True, stable=True).indices[: sum(counts)]
            starts = [0, len(scores[0])]
            best = [
                flat[(flat >= start) & (flat < start + len(score))] - start
                for start, score in zip(starts, scores, strict=True)
            ]
        kept.append(
            [
                {h.positions[prefix_len + int(i)] for i in chosen} | set(h.positions[-WINDOW:])
                for h, chosen in zip(heads, best, strict=True)
            ]
        )
    return kept


def long_answer(engine: Engine, steps: int, length: int = 130) -> LavaReq:
    req = engine.request(range(1, 1 + length), engine.coordinator.config, max_new_tokens=500)
    assert engine.admit(req)
    engine.extend((req, None))
    for _ in range(steps):
        engine.decode()
    return req


@pytest.fixture(params=[1, 16], ids="page {}".format)
def page_size(request: pytest.FixtureRequest) -> int:
    page: int = request.param
    return page


@pytest.mark.parametrize("method", ["lava", "snapkv", "pyramidkv", "lava_span"])
def test_the_best_of_tape_and_answer_stay(method: str, page_size: int) -> None:
    floor = {"head_floor": 0.0} if method == "lava" else {}
    engine = build_engine(page_size, config=tails(method, **floor))
    req = long_answer(engine, INTERVAL)
    engine.coordinator.before_decode(running_batch(engine))
    assert req.answer_compressed == 0, "the interval is not passed yet"
    engine.decode()
    before = heads_of(engine, req)
    if method == "lava_span":
        engine.check_slots()
    else:
        wanted = expected(engine, req, before)
    tail_len = req.tail_len
    engine.coordinator.before_decode(batch := running_batch(engine))
    assert batch.seq_lens.tolist() == [req.kv.kv_committed_len] == [req.budget]
    assert (req.answer_compressed, req.tail_len) == (tail_len, 0) and tail_len == INTERVAL + 1
    after = heads_of(engine, req)
    engine.check_slots()
    engine.tape.check_integrity(req.kv.req_pool_idx)
    for layer in range(NUM_LAYERS):
        had = sum(len(h.positions) - tail_len for h in before[layer])
        assert sum(len(h.positions) for h in after[layer]) == had
        for head in range(KV_HEADS):
            assert after[layer][head].positions == sorted(after[layer][head].positions)
            assert set(after[layer][head].positions[-WINDOW:]) == set(
                before[layer][head].positions[-WINDOW:]
            )
            if method != "lava_span":
                assert set(after[layer][head].positions) == wanted[layer][head], (layer, head)


def test_slots_stay_bounded_and_positions_true(page_size: int) -> None:
    """The engine asserts in every step that the next position is the true one."""
    engine = build_engine(page_size, config=tails())
    req = long_answer(engine, 0)
    assert req.budget is not None
    held = []
    for _ in range(5 * INTERVAL):
        engine.coordinator.before_decode(running_batch(engine))
        engine.decode()
        engine.check_slots()
        heads_of(engine, req)
        held.append(req.kv.kv_committed_len)
    assert max(held) <= req.budget + INTERVAL + 1
    assert req.answer_compressed >= 3 * INTERVAL
    assert req.info()["answer_tokens_compressed"] == req.answer_compressed
    engine.finish(req)
    engine.check_slots()


def test_a_ladder_trims_a_tape_that_holds_an_answer(page_size: int) -> None:
    engine = build_engine(page_size, config=tails(budget=(0.5, 0.25)))
    req = long_answer(engine, INTERVAL + 1)
    engine.coordinator.before_decode(running_batch(engine))
    assert req.answer_compressed > 0 and req.plan is not None
    target = req.next_budget
    assert engine.coordinator.make_room(running_batch(engine), lambda: req.budget == target)
    engine.check_slots()
    engine.tape.check_integrity(req.kv.req_pool_idx)
    last = {INTERVAL + 130 - i for i in range(WINDOW)}
    for heads in heads_of(engine, req):
        assert all(last <= set(head.positions) for head in heads)
    engine.decode()


def test_no_room_for_the_copy_waits(page_size: int) -> None:
    engine = build_engine(page_size, config=tails())
    req = long_answer(engine, INTERVAL + 1)
    taken = engine.allocator.alloc(engine.allocator.available_size())
    engine.tree.reset = lambda: None  # type: ignore[method-assign]
    while engine.tree.evictable_size():
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        evict_from_tree_cache(engine.tree, engine.tree.evictable_size())
        taken = torch.cat([taken, engine.allocator.alloc(engine.allocator.available_size())])
    engine.coordinator.before_decode(running_batch(engine))
    assert req.answer_compressed == 0 and req.tail_len == INTERVAL + 1
    engine.allocator.free(taken)
    engine.coordinator.before_decode(running_batch(engine))
    assert req.answer_compressed == INTERVAL + 1


def test_a_retracted_request_forgets_its_answers_tape(page_size: int) -> None:
    engine = build_engine(page_size, config=tails())
    req = long_answer(engine, INTERVAL + 1)
    engine.coordinator.before_decode(running_batch(engine))
    engine.retract(req)
    assert req.answer_compressed == 0 and req.slots_freed == 0
    assert engine.admit(req)
    engine.extend((req, None))
    engine.check()


def test_queries_that_take_too_much_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "DECODE_QUERY_BYTES", 1000)
    with pytest.raises(KVCompressionError, match=r"decode_interval=20: the last 4 queries of"):
        build_engine(1, config=tails())
