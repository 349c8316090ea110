# SPDX-License-Identifier: Apache-2.0
"""Admission in SGLang's own loop, with slots short: nobody is lost, refused or kept out."""

from typing import Any

import pytest
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.session.session_controller import Session

from lava_sglang.config import KVCompressionConfig
from tests.contract.scheduling import Served

pytestmark = pytest.mark.usefixtures("runtime_context")


def settings(**changes: Any) -> KVCompressionConfig:
    values = {"method": "snapkv", "budget": 0.25, "min_tokens": 16, "window_size": 4, **changes}
    return KVCompressionConfig(**values)


PRESSURE = settings(trigger="pressure")
OFF: dict[str, Any] = {"custom_params": {"kv_compression": {"enabled": False}}}


@pytest.fixture(params=[1, 16], ids="page {}".format)
def page_size(request: pytest.FixtureRequest) -> int:
    page: int = request.param
    return page


@pytest.fixture(params=[False, True], ids=["normal", "overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def run(scheduler: Served, steps: int) -> None:
    for _ in range(steps):
        scheduler.step()
        scheduler.check()


@pytest.mark.parametrize("config", [PRESSURE, settings(budget=(1, 0.25))], ids=["pressure", "1"])
def test_room_is_not_made_of_the_candidates_own_prefix(
    config: KVCompressionConfig, page_size: int, overlap: bool
) -> None:
    """A document of 800 tokens is cached, 1,100 run exactly; the document and 200 more arrive.

    The first copy of what runs finds its slots in the tree: what was matched is matched again.
    """
    served = Served(config, slots=2048, page_size=page_size, overlap=overlap)
    served.send(800, max_new_tokens=2, **OFF)
    served.serve()
    exact = served.send(1100, first=5000, max_new_tokens=100)
    run(served, 5)
    assert not exact.compressed and len(exact.output_ids) > 1
    late = served.send(1000, max_new_tokens=8)
    served.serve(check=True)
    assert exact.compressed and late.cached_tokens == 0
    assert [len(req.output_ids) for req in served.finished[1:]] == [8, 100]


def test_a_candidates_prefix_stays_where_room_is_made_beside_it(
    page_size: int, overlap: bool
) -> None:
    """The document, older than another text in the tree, would be the first to be evicted."""
    served = Served(PRESSURE, slots=2048, page_size=page_size, overlap=overlap)
    served.send(400, max_new_tokens=2, **OFF)
    served.serve()
    served.send(320, first=3000, max_new_tokens=2, **OFF)
    served.serve()
    exact = served.send(1100, first=5000, max_new_tokens=100)
    run(served, 5)
    late = served.send(700, max_new_tokens=8)
    served.serve(check=True)
    assert exact.compressed and late.cached_tokens >= 384
    assert [len(req.output_ids) for req in served.finished[2:]] == [8, 100]


def test_a_turn_of_a_streaming_session_keeps_what_it_has(page_size: int, overlap: bool) -> None:
    """700 tokens are the session's, 1,100 run and find no room for a copy. The next turn
    waits for them: its row is no match that it could do without."""
    served = Served(PRESSURE, slots=2048, page_size=page_size, overlap=overlap)
    session = Session(100_000, "session", streaming=True)
    turn = served.send(700, max_new_tokens=8, session=session)
    while not served.finished:
        served.step()
    exact = served.send(1100, first=5000, max_new_tokens=100)
    for _ in range(5):
        served.step()
    text = [*turn.origin_input_ids, *turn.output_ids, *range(20_000, 20_300)]
    late = served.queue(served.engine.request(text, max_new_tokens=8, session=session))
    while len(served.finished) < 3:
        served.step()
        assert served.steps < 1000
    assert served.finished == [turn, exact, late]
    assert [req.skip_reason for req in served.finished] == ["session", "no_room", "session"]
    assert late.cached_tokens >= 707 // page_size * page_size
    served.tree_cache.release_session("session")
    served.check_idle()


@pytest.mark.parametrize("page_size", [1, 16])
def test_an_identical_prompt_is_admitted_again_in_scope_prompt(page_size: int) -> None:
    """2,048 slots, 1,200 tokens and 600 new: what it matches is unlocked when its prefill ends."""
    served = Served(settings(scope="prompt"), slots=2048, page_size=page_size)
    for answer in (20, 600, 600):
        served.send(1200, max_new_tokens=answer)
        served.serve()
    assert [len(req.output_ids) for req in served.finished] == [20, 600, 600]
    assert all(req.compressed for req in served.finished)


def test_a_retracted_request_is_admitted_again(page_size: int, overlap: bool) -> None:
    """It matches the exact prompt that it left in the tree, which its copy unlocks again."""
    served = Served(settings(), slots=2048, page_size=page_size, overlap=overlap)
    req = served.send(1200, max_new_tokens=700)
    run(served, 100)
    assert req.compressed
    served.running_batch.release_req(0, 0)
    served.running_batch.filter_batch(keep_indices=[])
    served.last_batch = None
    served.result_queue.clear()
    served.queue(req)
    served.serve()
    assert served.finished == [req] and len(req.output_ids) == 700, req.finished_reason


@pytest.mark.parametrize("decode_steps", [2, 3, 6])
def test_answers_that_grow_between_chunks_are_counted(
    decode_steps: int, page_size: int, overlap: bool
) -> None:
    """--prefill-decode-interval: four answers take slots while the long prompt is prefilled."""
    served = Served(
        settings(),
        slots=640,
        chunk=32,
        decode_steps=decode_steps,
        page_size=page_size,
        overlap=overlap,
    )
    for i in range(4):
        served.send(60, first=1000 * i, max_new_tokens=120)
    run(served, 12)
    late = served.send(360, first=9000, max_new_tokens=8)
    served.serve(check=True)
    assert late.compressed and len(served.finished) == 5
    assert (served.retractions, served.aborted) == (0, [])


def test_a_chunk_that_finds_no_slots_waits(page_size: int, overlap: bool) -> None:
    """SGLang would launch it in any case, and end the server."""
    served = Served(settings(), slots=512, chunk=64, page_size=page_size, overlap=overlap)
    neighbour = served.send(100, first=5000, max_new_tokens=40)
    run(served, 4)
    late = served.send(300, max_new_tokens=8)
    while late.extend_end is None or late.extend_end < 128:
        run(served, 1)
    evict_from_tree_cache(served.tree_cache, 512)
    taken = served.token_to_kv_pool_allocator.alloc(
        served.token_to_kv_pool_allocator.available_size() // 16 * 16 - 48
    )
    for _ in range(6):
        assert served.step() == "decode"
    assert served.chunked_req is late and len(neighbour.output_ids) >= 6
    served.token_to_kv_pool_allocator.free(taken)
    served.serve()
    assert late.compressed and len(served.finished) == 2


def test_the_next_prompt_starts_ahead_whatever_else_runs(page_size: int) -> None:
    """400 slots come back at the end of the pass; 400 tokens of others run beside."""
    served = Served(
        settings(admit_ahead=True, min_tokens=300), slots=1024, chunk=448, page_size=page_size
    )
    for i in range(2):
        served.send(200, first=1000 * i + 1, max_new_tokens=100)
    run(served, 3)
    first = served.send(400, first=5000, max_new_tokens=8)
    second = served.send(320, first=7000, max_new_tokens=8)
    served.step()
    assert first.compressed and served.chunked_req is second
    served.serve(check=True)
    assert second.compressed and len(served.finished) == 4


def test_a_long_answers_compression_opens_admission(page_size: int, overlap: bool) -> None:
    """320 tokens and their copy of 80 fit beside a tape of 50 and up to 61 tokens of answer. They
    come when there are 70, and are admitted when those are compressed, at 80."""
    served = Served(settings(decode_interval=80), slots=512, page_size=page_size, overlap=overlap)
    long = served.send(200, first=5000, max_new_tokens=300)
    while len(long.output_ids) < 72:
        run(served, 1)
    waiting = served.send(320, max_new_tokens=8)
    run(served, 3)
    assert served.waiting_queue == [waiting] and served.running_batch.batch_is_full
    served.serve(check=True)
    assert long.answer_compressed and served.finished == [waiting, long]
