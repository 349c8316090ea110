# SPDX-License-Identifier: Apache-2.0
"""A request's prompt is swapped for private slots, and SGLang's own counts stay right.

Invariants 3 and 4 of the design on SGLang's real tree, allocators and rows: free, evictable and
owned slots are the pool after every step; what the tree holds is exact.
"""

import random

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import release_kv_cache

from lava_sglang.managers.compression_state import SkipReason
from lava_sglang.managers.request import LavaReq
from lava_sglang.mem_cache.row import alloc_slots, swap_in_private_slots
from lava_sglang.methods import METHODS
from tests.contract.engine import CONFIG, Engine, build_engine, running_batch

pytestmark = pytest.mark.usefixtures("runtime_context")

PAGE_SIZES = [1, 16]


def text(length: int, first: int = 0) -> list[int]:
    return list(range(1 + first, 1 + first + length))


@pytest.fixture(params=PAGE_SIZES, ids="page {}".format)
def page_size(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
def engine(page_size: int) -> Engine:
    return build_engine(page_size)


def owned(engine: Engine) -> tuple[int, int, int]:
    """Free, evictable and locked slots."""
    return (
        engine.allocator.available_size(),
        engine.tree.evictable_size(),
        engine.tree.protected_size(),
    )


def warm(engine: Engine, tokens: list[int]) -> None:
    """Leave a text in the tree, unlocked."""
    req = engine.request(tokens, custom_params={"kv_compression": {"enabled": False}})
    assert engine.admit(req)
    engine.extend((req, None))
    engine.finish(req)
    engine.check()


def prefilled(engine: Engine, tokens: list[int], *chunks: int) -> LavaReq:
    """A request whose last chunk has been launched; the swap has not happened."""
    req = engine.request(tokens)
    assert engine.admit(req)
    for size in chunks:
        engine.extend((req, size))
    engine.extend((req, None), process=False)
    return req


def finish_swapped(engine: Engine, req: LavaReq) -> None:
    engine.prefilling.remove(req)
    req.output_ids.append(1)
    req.finished_reason = FINISH_LENGTH(length=1)
    release_kv_cache(req, engine.tree, checkpoint=True)


@pytest.mark.parametrize("chunks", [(), (16,), (16, 15), (7, 20)], ids=str)
@pytest.mark.parametrize("shared", [0, 16, 48])
@pytest.mark.parametrize("length", [80, 83, 96])
def test_a_swap_leaves_every_slot_with_one_owner(
    engine: Engine, page_size: int, length: int, shared: int, chunks: tuple[int, ...]
) -> None:
    if shared:
        warm(engine, text(shared))
    req = prefilled(engine, text(length), *chunks)
    row_before = engine.row(req, length).tolist()
    slots = alloc_slots(engine.tree, 32)
    assert slots is not None and slots.dtype == torch.int64 and len(slots) == 32

    swap_in_private_slots(req, engine.tree, shared, slots)

    end = shared + 32
    whole_pages = length // page_size * page_size
    kv = req.kv
    assert (kv.cache_protected_len, kv.kv_committed_len, kv.kv_allocated_len) == (shared, end, end)
    assert engine.row(req).tolist() == row_before[:shared] + slots.tolist()
    # The pool: 32 private slots, P locked, the rest of the prompt's whole pages evictable.
    assert owned(engine) == (512 - whole_pages - 32, whole_pages - shared, shared)
    assert req.skip_radix_cache_insert

    finish_swapped(engine, req)
    assert owned(engine) == (512 - whole_pages, whole_pages, 0)
    engine.tree.sanity_check()


@pytest.mark.parametrize("length", [80, 83])
def test_a_swap_of_the_whole_prompt_gives_up_the_shared_prefix(
    engine: Engine, page_size: int, length: int
) -> None:
    """scope="prompt": nothing stays locked."""
    warm(engine, text(48))
    req = prefilled(engine, text(length))
    slots = alloc_slots(engine.tree, 32)
    assert slots is not None
    swap_in_private_slots(req, engine.tree, 0, slots)
    assert engine.row(req).tolist() == slots.tolist()
    assert req.lock is None
    whole_pages = length // page_size * page_size
    assert owned(engine) == (512 - whole_pages - 32, whole_pages, 0)
    finish_swapped(engine, req)
    assert owned(engine) == (512 - whole_pages, whole_pages, 0)


@pytest.mark.parametrize("length", [80, 83])
def test_without_a_tree_the_prompts_slots_are_free_at_once(page_size: int, length: int) -> None:
    engine = build_engine(page_size, disable_radix_cache=True)
    req = prefilled(engine, text(length), 16)
    slots = alloc_slots(engine.tree, 32)
    assert slots is not None
    swap_in_private_slots(req, engine.tree, 0, slots)
    assert owned(engine) == (512 - 32, 0, 0)
    assert engine.row(req).tolist() == slots.tolist()
    finish_swapped(engine, req)
    assert owned(engine) == (512, 0, 0)


def test_two_prefills_of_one_prompt_leave_one_copy(engine: Engine, page_size: int) -> None:
    """Both are computed before either is in the tree; the second one's slots are duplicates."""
    first, second = (engine.request(text(83)) for _ in range(2))
    assert engine.admit(first) and engine.admit(second)
    engine.extend((first, None), (second, None), process=False)
    for req in (first, second):
        slots = alloc_slots(engine.tree, 32)
        assert slots is not None
        swap_in_private_slots(req, engine.tree, 0, slots)
    whole_pages = 83 // page_size * page_size
    assert owned(engine) == (512 - whole_pages - 64, whole_pages, 0)
    for req in (first, second):
        finish_swapped(engine, req)
    assert owned(engine) == (512 - whole_pages, whole_pages, 0)


def test_the_lock_is_moved_and_not_dropped_between(engine: Engine, page_size: int) -> None:
    """Another request that shares the prefix keeps its own lock."""
    warm(engine, text(48))
    other = engine.request(text(60))
    assert engine.admit(other)
    req = prefilled(engine, text(90))
    slots = alloc_slots(engine.tree, 32)
    assert slots is not None
    swap_in_private_slots(req, engine.tree, 48, slots)
    assert engine.tree.protected_size() == 48
    finish_swapped(engine, req)
    assert engine.tree.protected_size() == 48
    engine.tree.unlock(other.lock)
    assert engine.tree.protected_size() == 0


def test_slots_are_found_by_evicting_and_never_from_a_locked_prompt(page_size: int) -> None:
    engine = build_engine(page_size, slots=256)
    warm(engine, text(96, first=1000))
    req = prefilled(engine, text(128))  # private, not in the tree yet
    assert owned(engine) == (32, 96, 0)
    before = engine.row(req, 128).tolist()
    slots = alloc_slots(engine.tree, 64)
    assert slots is not None and not set(slots.tolist()) & set(before)
    assert owned(engine)[0] >= 0 and sum(owned(engine)) == 64
    assert alloc_slots(engine.tree, 80) is None  # what is left cannot give that much
    assert engine.row(req, 128).tolist() == before


def test_evicting_after_a_swap_takes_the_exact_suffix_and_leaves_the_prefix(
    engine: Engine, page_size: int
) -> None:
    warm(engine, text(48))
    req = engine.request(text(112), CONFIG)
    assert engine.admit(req)
    engine.extend((req, None))
    assert req.compressed
    engine.check()
    engine.tree.evict(EvictParams(num_tokens=512))
    assert engine.tree.evictable_size() == 0 and engine.tree.protected_size() == 48
    engine.decode()
    engine.check()
    engine.finish(req)
    engine.check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunks", [(), (16, 48), (50, 30)], ids=str)
@pytest.mark.parametrize("shared", [0, 32])
def test_a_compressed_request_reads_the_entries_it_chose(
    engine: Engine, method: str, shared: int, chunks: tuple[int, ...]
) -> None:
    if shared:
        warm(engine, text(shared))
    config = CONFIG.model_copy(update={"method": method})
    req = engine.request(text(118), config)
    assert engine.admit(req)
    for size in (*chunks, None):
        engine.extend((req, size))
        engine.check()
    assert req.compressed and req.plan is not None
    assert req.plan.shared_prefix_len == shared
    for _ in range(20):  # past a page
        engine.decode()
        engine.check()
    engine.finish(req)
    engine.check()
    assert owned(engine)[2] == 0


def test_a_prefix_hit_on_a_compressed_suffix_is_exact(engine: Engine, page_size: int) -> None:
    """Invariant 4, in memory: the later prompt gets the whole exact prompt from the tree."""
    req = engine.request(text(112))
    assert engine.admit(req)
    engine.extend((req, None))
    assert req.compressed
    later = engine.request(text(112) + text(40, first=500))
    assert engine.admit(later)
    assert later.prefix_len == 112
    engine.extend((later, None))
    engine.check()
    engine.finish(req)
    engine.check()
    assert later.compressed and later.plan is not None and later.plan.shared_prefix_len == 112
    engine.decode()
    engine.check()


def test_a_retracted_request_is_compressed_again(engine: Engine, page_size: int) -> None:
    """Its own exact prompt is matched in the tree and is still its own, not a shared prefix."""
    warm(engine, text(32))
    req = engine.request(text(118))
    assert engine.admit(req)
    engine.extend((req, None))
    first_plan = req.plan
    assert first_plan is not None
    for _ in range(5):
        engine.decode()
    engine.retract(req)
    engine.check()
    assert (req.compressed, req.plan, req.skip_radix_cache_insert) == (False, None, False)
    assert engine.admit(req)
    # All but the window comes from the tree.
    assert 32 < req.prefix_len <= 118 + 6 - CONFIG.window_size
    engine.extend((req, None))
    assert req.compressed and req.plan is not None
    assert req.plan.shared_prefix_len == first_plan.shared_prefix_len == 32
    assert req.plan.prompt_len == 118 + 6
    engine.check()
    engine.decode()
    engine.check()
    engine.finish(req)
    engine.check()


def test_a_prompt_that_the_tree_holds_is_compressed_whole_under_scope_prompt(
    engine: Engine,
) -> None:
    warm(engine, text(112))
    config = CONFIG.model_copy(update={"scope": "prompt", "method": "snapkv"})
    req = engine.request(text(112), config)
    assert engine.admit(req)
    assert 0 < req.prefix_len <= 112 - CONFIG.window_size
    engine.extend((req, None))
    assert req.compressed and req.plan is not None
    assert (req.plan.shared_prefix_len, req.plan.suffix_len) == (0, 112)
    engine.check()
    engine.decode()
    engine.check()


def test_no_room_leaves_the_request_uncompressed(page_size: int) -> None:
    engine = build_engine(page_size, slots=128)
    config = CONFIG.model_copy(update={"budget": (0.5,)})
    req = engine.request(text(100), config)
    assert engine.admit(req)
    engine.extend((req, None))
    assert (req.compressed, req.skip_reason) == (False, SkipReason.NO_ROOM)
    engine.check()
    engine.decode()
    engine.check()
    engine.finish(req)
    engine.check()


def test_several_prompts_that_end_in_one_batch(engine: Engine) -> None:
    reqs = [engine.request(text(length, first=1000 * length)) for length in (60, 83, 17, 10)]
    assert all(engine.admit(req) for req in reqs)
    engine.extend((reqs[0], 20))
    batch = engine.extend(*[(req, None) for req in reqs])
    engine.check()
    assert [req.compressed for req in reqs] == [True, True, True, False]
    assert batch.seq_lens.tolist() == [req.kv.kv_committed_len for req in reqs]
    assert torch.equal(batch.seq_lens, batch.seq_lens_cpu) and batch.seq_lens_sum is None
    engine.decode()
    engine.check()


def random_text(rng: random.Random, documents: list[list[int]]) -> list[int]:
    """A piece of one of a few documents, then words of its own: prefixes are often shared."""
    document = rng.choice(documents)
    shared = document[: rng.choice([0, 16, 37, 64, len(document)])]
    own = rng.choice([0, 5, 20, 60, 110])
    start = rng.randrange(5)  # a few different endings: exact duplicates happen
    return (shared + text(own, first=100 * start + 5000)) or [1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("disabled", [False, True], ids=["radix", "no radix"])
def test_random_lifecycles_leak_nothing(page_size: int, disabled: bool, seed: int) -> None:
    """Admit, chunk, compress, decode, finish, retract, flush in any order; checked every step."""
    rng = random.Random(seed)
    ladder = CONFIG.model_copy(update={"budget": (0.5, 0.25)})
    engine = build_engine(page_size, slots=384, disable_radix_cache=disabled, config=ladder)
    documents = [text(90, first=1000 * number) for number in range(3)]
    waiting: list[LavaReq] = []

    def start() -> None:
        req = waiting.pop(0) if waiting else new_request()
        if len(engine.prefilling) + len(engine.decoding) >= 5 or not engine.admit(req):
            waiting.append(req)

    def new_request() -> LavaReq:
        budget = rng.choice([(0.1,), (0.25,), (0.6, 0.3, 0.1), (1.0,), (1.0, 0.5), (24.0,)])
        # Of the others a trim is not what a compression at once is, or there is none.
        methods = ["lava", "snapkv", "random"] if len(budget) > 1 else list(METHODS)
        config = CONFIG.model_copy(
            update={
                "method": rng.choice(methods),
                "budget": budget,
                "scope": rng.choice(["suffix", "suffix", "prompt", "auto"]),
                "trigger": rng.choice(["always", "always", "pressure"]),
            }
        )
        tenant = rng.choice([None, None, "tenant"])
        return engine.request(random_text(rng, documents), config, extra_key=tenant)

    def extend() -> None:
        chunks = []
        room = engine.allocator.available_size() + engine.tree.evictable_size()
        for req in rng.sample(engine.prefilling, k=len(engine.prefilling)):
            left = len(req.full_untruncated_fill_ids) - req.prefix_len
            size = rng.choice([left, left, max(1, left // 2), 7])
            room -= min(size, left) + page_size
            if room >= 0:
                chunks.append((req, size))
        if chunks:
            engine.extend(*chunks)

    def decode() -> None:
        while len(engine.decoding) * page_size > (
            engine.allocator.available_size() + engine.tree.evictable_size()
        ):
            retract()
        for _ in range(rng.choice([1, 3])):
            if len(engine.decoding) * page_size <= engine.allocator.available_size():
                engine.decode()

    def shrink() -> None:
        batch = running_batch(engine)
        steps = iter([False] * rng.choice([1, 2, 4]))
        engine.coordinator.make_room(batch, lambda: next(steps, True))
        assert batch.seq_lens.tolist() == [req.kv.kv_committed_len for req in engine.decoding]

    def finish() -> None:
        if engine.decoding:
            engine.finish(rng.choice(engine.decoding))

    def retract() -> None:
        live = [req for req in engine.decoding + engine.prefilling if req.kv.holds_kv]
        if live:
            req = rng.choice(live)
            engine.retract(req)
            waiting.append(req)

    def flush() -> None:
        if not engine.decoding and not engine.prefilling:
            engine.tree.reset()
            engine.rows.clear()
            engine.allocator.clear()
            engine.served.clear()

    actions = [start, start, start, extend, extend, extend, decode, decode, finish, finish, retract]
    actions += [shrink, shrink]
    for _ in range(100):
        rng.choice([*actions, flush])()
        engine.check()
    for _ in range(1000):
        if not engine.prefilling and not engine.decoding:
            break
        # Two half prefilled prompts can be in each other's way: one steps back.
        rng.choice([extend, decode, finish, finish, retract])()
        engine.check()
    assert engine.prefilling == engine.decoding == []
    free, evictable, protected = owned(engine)
    assert free + evictable == 384 and protected == 0
    assert engine.rows.available_size() == 16
    outcomes = engine.coordinator.stats.requests
    assert outcomes["compressed"] >= 3 and len(outcomes) >= 2
