# SPDX-License-Identifier: Apache-2.0
"""Budgets that fall under pressure: on SGLang's real pools, tree and rows."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from lava_sglang.config import KVCompressionConfig
from lava_sglang.managers.compression_state import ExactForNow
from lava_sglang.managers.request import LavaReq
from tests.contract.engine import Engine, build_engine, running_batch

pytestmark = pytest.mark.usefixtures("runtime_context")

METHODS = ["lava", "snapkv", "pyramidkv", "random"]


def ladder(method: str = "lava", **settings: Any) -> KVCompressionConfig:
    values = {"budget": (0.75, 0.5, 0.25), "min_tokens": 16, "window_size": 4, **settings}
    return KVCompressionConfig(method=method, **values)


def serve(engine: Engine, *lengths: int, steps: int = 0) -> list[LavaReq]:
    """Requests of these lengths, prefilled one after the other, then so many tokens each."""
    reqs = []
    for i, length in enumerate(lengths):
        req = engine.request(range(1000 * i + 1, 1000 * i + 1 + length), engine.coordinator.config)
        assert engine.admit(req)
        engine.extend((req, None))
        reqs.append(req)
    for _ in range(steps):
        engine.decode()
    return reqs


def shrink(engine: Engine, req: LavaReq) -> None:
    """One rung down, and what the engine believes is kept with it."""
    batch = running_batch(engine)
    target = req.next_budget
    assert target is not None
    assert engine.coordinator.make_room(batch, lambda: req.budget == target)
    assert batch.seq_lens_cpu.tolist() == [r.kv.kv_committed_len for r in engine.decoding]
    assert torch.equal(batch.seq_lens, batch.seq_lens_cpu) and batch.seq_lens_sum is None


@pytest.fixture(params=[1, 16], ids="page {}".format)
def page_size(request: pytest.FixtureRequest) -> int:
    page: int = request.param
    return page


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_trim_keeps_what_the_lower_budget_keeps(method: str, steps: int, page_size: int) -> None:
    """Down two rungs while decoding: the entries of a compression at the lowest rung at once."""
    config = ladder(method)
    engine = build_engine(page_size, config=config)
    (req,) = serve(engine, 130, steps=steps)
    assert req.plan is not None and len(req.plan.rungs) == 3
    assert req.budget == req.plan.rungs[0]
    engine.check()
    for rung in req.plan.rungs[1:]:
        shrink(engine, req)
        assert req.budget == rung
        engine.check()
        engine.decode()
        engine.check()
    engine.finish(req)
    engine.check()


def test_adakv_keeps_its_floor_through_trims(page_size: int) -> None:
    """Rounding may move an entry between a trim and a compression at once; the sums are exact."""
    engine = build_engine(page_size, config=ladder("adakv"))
    (req,) = serve(engine, 130)
    while req.next_budget is not None:
        shrink(engine, req)
        engine.tape.check_integrity(req.kv.req_pool_idx)
    assert req.plan is not None and req.budget == req.plan.rungs[-1]
    counts = engine.tape.offsets[req.kv.req_pool_idx].diff()
    assert (counts - 4 >= int(0.2 * (req.budget - 4)) - 1).all()


def test_the_largest_goes_first_and_none_below_the_last_rung(page_size: int) -> None:
    engine = build_engine(page_size, slots=1024, config=ladder())
    small, large = serve(engine, 100, 300)
    order = []

    def note() -> bool:
        order.append((small.budget, large.budget))
        return False

    assert engine.coordinator.make_room(running_batch(engine), note) is False
    assert small.plan is not None and large.plan is not None
    assert (small.budget, large.budget) == (small.plan.rungs[-1], large.plan.rungs[-1])
    for before, after in pairwise(order):
        changed = 0 if before[0] != after[0] else 1
        lowest = small.plan.rungs[-1], large.plan.rungs[-1]
        assert before[changed] == max(b for b, last in zip(before, lowest, strict=True) if b > last)
    assert engine.coordinator.stats.trims == len(order) - 1 == 4


def test_trimmed_slots_are_free_at_once(page_size: int) -> None:
    engine = build_engine(page_size, config=ladder())
    (req,) = serve(engine, 200, steps=2)
    before, held = engine.allocator.available_size(), req.budget
    shrink(engine, req)
    assert held is not None and req.budget is not None
    assert engine.allocator.available_size() - before == held - req.budget
    assert engine.coordinator.stats.slots_trimmed == held - req.budget


def test_the_first_rung_is_taken_where_slots_are_plenty(page_size: int) -> None:
    engine = build_engine(page_size, slots=2048, config=ladder())
    reqs = serve(engine, 130, 130)
    assert all(req.plan is not None and req.budget == req.plan.rungs[0] for req in reqs)


def test_a_lower_rung_is_taken_where_others_wait(page_size: int) -> None:
    engine = build_engine(page_size, slots=512, config=ladder())
    config = engine.coordinator.config
    waiting = [engine.request(range(5000 * i, 5000 * i + 200), config) for i in range(1, 9)]
    engine.scheduler.waiting_queue.extend(waiting)
    (req,) = serve(engine, 200)
    assert req.plan is not None and req.budget == req.plan.rungs[-1]


def test_a_pressure_request_is_exact_until_slots_are_short(page_size: int) -> None:
    engine = build_engine(page_size, config=ladder(budget=0.25, trigger="pressure"))
    (req,) = serve(engine, 130, steps=3)
    assert not req.compressed and isinstance(req.compression_state, ExactForNow)
    assert req.window is not None and req.info()["reason"] == "no_pressure"
    engine.check()
    engine.coordinator.before_decode(running_batch(engine))
    assert not req.compressed, "there is room"
    shrink(engine, req)
    assert req.compressed and req.window is None and req.info()["status"] == "compressed"
    engine.check()
    engine.decode()
    engine.check()
    assert dict(engine.coordinator.stats.requests) == {"no_pressure": 1, "compressed": 1}
    engine.finish(req)
    engine.check()


def test_a_request_that_stays_exact_is_worth_asking_admission_again(page_size: int) -> None:
    """It can shrink from now on, and could not while it was prefilled."""
    engine = build_engine(page_size, config=ladder(budget=0.25, trigger="pressure"))
    req = engine.request(range(1, 131), engine.coordinator.config)
    assert engine.admit(req)
    batch = engine.extend((req, 60), process=False)
    assert engine.coordinator.end_extend(batch) is False, "a middle chunk"
    engine.process(req)
    batch = engine.extend((req, None), process=False)
    assert engine.coordinator.end_extend(batch) is True and not req.compressed


def test_a_ladder_whose_first_rung_is_everything_starts_exact(page_size: int) -> None:
    engine = build_engine(page_size, config=ladder(budget=(1, 0.5, 0.25)))
    (req,) = serve(engine, 130, steps=2)
    assert not req.compressed and req.window is not None
    shrink(engine, req)
    assert req.plan is not None and req.budget == req.plan.rungs[0]
    engine.check()
    shrink(engine, req)
    assert req.budget == req.plan.rungs[1]


def test_a_full_pool_compresses_before_anything_is_retracted() -> None:
    """Room for the copy is kept from the start, and used before the last slot is gone."""
    engine = build_engine(1, slots=420, config=ladder(budget=0.25, trigger="pressure"))
    serve(engine, 150, 150)
    assert not any(req.compressed for req in engine.decoding)
    compressed = []
    for _ in range(60):
        batch = running_batch(engine)
        engine.coordinator.before_decode(batch)
        compressed.append(sum(req.compressed for req in engine.decoding))
        engine.decode()
        engine.check()
    assert compressed[0] == 0 and compressed[-1] >= 1


def test_before_a_decode_it_says_whether_slots_were_freed() -> None:
    engine = build_engine(1, slots=420, config=ladder(budget=0.25, trigger="pressure"))
    serve(engine, 150, 150)
    found = []
    while not any(found):
        before = engine.coordinator.demand.free_slots()
        found.append(engine.coordinator.before_decode(running_batch(engine)))
        assert found[-1] == (engine.coordinator.demand.free_slots() > before)
        engine.decode()
    assert len(found) > 1


def test_nobody_shrinks_where_all_of_it_is_not_enough(page_size: int) -> None:
    """32 slots can be had by a trim, 216 by a first copy, for which there are no 72 free."""
    engine = build_engine(page_size, slots=512, config=ladder(budget=(1, 0.5, 0.25)))
    override = {"kv_compression": {"budget": [0.5, 0.25]}}
    trimmed = engine.request(range(1, 129), engine.coordinator.config, custom_params=override)
    exact = engine.request(range(1000, 1288), engine.coordinator.config)
    off = engine.request(
        range(5000, 5128),
        engine.coordinator.config,
        custom_params={"kv_compression": {"enabled": False}},
    )
    for req in (trimmed, exact, off):
        assert engine.admit(req)
        engine.extend((req, None))
    held = trimmed.budget
    assert trimmed.compressed and not exact.compressed
    batch = running_batch(engine)
    gain = engine.coordinator.shrinkable_slots(batch)
    free = engine.coordinator.demand.free_slots()
    assert trimmed.plan is not None and gain == held - trimmed.plan.rungs[-1]
    assert not engine.coordinator.make_room(batch, lambda: False)
    assert engine.coordinator.demand.free_slots() == free + gain
    assert not exact.compressed
    engine.check()


def test_a_first_copy_is_made_in_the_room_of_a_trim(page_size: int) -> None:
    engine = build_engine(page_size, slots=512, config=ladder(budget=(1, 0.5, 0.25)))
    override = {"kv_compression": {"budget": [0.5, 0.25]}}
    trimmed = engine.request(range(1, 193), engine.coordinator.config, custom_params=override)
    exact = engine.request(range(1000, 1192), engine.coordinator.config)
    off = engine.request(
        range(5000, 5192),
        engine.coordinator.config,
        custom_params={"kv_compression": {"enabled": False}},
    )
    for req in (trimmed, exact, off):
        assert engine.admit(req)
        engine.extend((req, None))
    batch = running_batch(engine)
    free, gain = (
        engine.coordinator.demand.free_slots(),
        engine.coordinator.shrinkable_slots(batch),
    )
    assert exact.plan is not None and free < exact.plan.rungs[-1]
    assert not engine.coordinator.make_room(batch, lambda: False)
    assert exact.compressed and engine.coordinator.demand.free_slots() == free + gain
    engine.check()


def test_a_first_copy_that_frees_no_slot_is_not_made(page_size: int) -> None:
    """In scope `prompt` a copy takes 80 slots, and what was matched stays locked by another."""
    engine = build_engine(page_size, config=ladder(budget=0.25, trigger="pressure", scope="prompt"))
    off = engine.request(
        range(1, 305),
        engine.coordinator.config,
        custom_params={"kv_compression": {"enabled": False}},
    )
    exact = engine.request(range(1, 321), engine.coordinator.config)
    for req in (off, exact):
        assert engine.admit(req)
        engine.extend((req, None))
    free = engine.coordinator.demand.free_slots()
    batch = running_batch(engine)
    assert exact.next_budget is not None and engine.coordinator.shrinkable_slots(batch) == 0
    assert not engine.coordinator.make_room(batch, lambda: False)
    assert not exact.compressed and engine.coordinator.demand.free_slots() == free
    engine.check()
    engine.finish(off)
    assert engine.coordinator.shrinkable_slots(batch := running_batch(engine)) == 320 - 80
    assert not engine.coordinator.make_room(batch, lambda: False)
    assert exact.compressed
    engine.check()


def test_a_retracted_request_starts_over(page_size: int) -> None:
    engine = build_engine(page_size, config=ladder())
    (req,) = serve(engine, 130, steps=2)
    shrink(engine, req)
    engine.retract(req)
    engine.check()
    assert not req.compressed and req.plan is None
    assert engine.admit(req)
    engine.extend((req, None))
    assert req.plan is not None and req.budget == req.plan.rungs[0]
    engine.check()


def test_no_scores_are_kept_without_a_ladder() -> None:
    engine = build_engine(1)
    assert engine.coordinator.compressor.scores is None and not engine.coordinator.may_shrink


@pytest.mark.parametrize("held_bytes", [0, 10**12])
def test_queries_are_held_for_so_many_requests_only(
    held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lava_sglang.managers.coordinator.DEFERRED_WINDOW_BYTES", held_bytes, raising=True
    )
    engine = build_engine(1, config=ladder(budget=0.25, trigger="pressure"))
    (req,) = serve(engine, 130)
    assert req.compressed is (held_bytes == 0)


def test_the_ladder_costs_two_bytes_an_entry() -> None:
    engine = build_engine(1, config=ladder())
    compressor = engine.coordinator.compressor
    assert compressor is not None and compressor.scores is not None
    entries = engine.pool.arena.numel() // (2 * engine.pool.arena.shape[-1])
    assert compressor.scores.scores.nbytes == 2 * entries
