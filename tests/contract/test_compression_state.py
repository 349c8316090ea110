# SPDX-License-Identifier: Apache-2.0
"""Which state of a request's compression may follow which: the request goes no other way."""

from collections.abc import Callable
from itertools import product

import pytest

from lava_sglang.managers.compression_state import (
    FOLLOWERS,
    Compressed,
    ExactForNow,
    IllegalTransition,
    Pending,
    Planned,
    Skipped,
    SkipReason,
)
from lava_sglang.managers.request import LavaReq
from tests.contract.test_request import request

LAYERS = 2


def planned() -> LavaReq:
    req = request()
    req.begin_prefill(LAYERS)
    return req


def exact_for_now() -> LavaReq:
    req = planned()
    req.stay_exact_for_now()
    return req


def compressed() -> LavaReq:
    req = planned()
    req.take_tape(250)
    return req


def skipped() -> LavaReq:
    req = planned()
    req.skip_compression(SkipReason.NO_ROOM)
    return req


IN_STATE: dict[type, Callable[[], LavaReq]] = {
    Pending: request,
    Planned: planned,
    ExactForNow: exact_for_now,
    Compressed: compressed,
    Skipped: skipped,
}

TRANSITIONS: dict[str, tuple[Callable[[LavaReq], None], type, tuple[type, ...]]] = {
    # What is called, where it leads, from which states.
    "skip": (lambda req: req.skip_compression(SkipReason.ABORTED), Skipped, (Pending, Planned)),
    "stay exact": (lambda req: req.stay_exact_for_now(), ExactForNow, (Planned,)),
    "take a tape": (lambda req: req.take_tape(200), Compressed, (Planned, ExactForNow)),
    "shorten it": (lambda req: req.shorten_tape(100), Compressed, (Compressed,)),
    "take the answer": (lambda req: req.take_answer(9), Compressed, (Compressed,)),
    "retract": (lambda req: req.reset_for_retract(), Pending, tuple(IN_STATE)),
}


@pytest.mark.parametrize(("name", "state"), product(TRANSITIONS, IN_STATE))
def test_a_transition_from_a_state(name: str, state: type) -> None:
    req = IN_STATE[state]()
    assert type(req.compression_state) is state
    call, leads_to, legal = TRANSITIONS[name]
    before = req.compression_state
    if state in legal:
        call(req)
        assert type(req.compression_state) is leads_to
    else:
        with pytest.raises(IllegalTransition):
            call(req)
        assert req.compression_state is before


def test_the_table_is_what_the_transitions_do() -> None:
    """A retraction is in no table: it leads to Pending from anywhere. Planning is a prefill's."""
    found: dict[type, set[type]] = {state: set() for state in IN_STATE}
    found[Pending].add(Planned)
    for name, (_, leads_to, legal) in TRANSITIONS.items():
        for state in legal if name != "retract" else ():
            found[state].add(leads_to)
    assert found == {state: set(followers) for state, followers in FOLLOWERS.items()}


@pytest.mark.parametrize("state", [Planned, ExactForNow, Compressed, Skipped])
def test_a_later_chunk_changes_nothing(state: type) -> None:
    req = IN_STATE[state]()
    before = req.compression_state
    req.begin_prefill(LAYERS)
    assert req.compression_state is before


def test_what_each_state_shows() -> None:
    assert [req().skip_reason for req in IN_STATE.values()] == [
        None,
        None,
        "no_pressure",
        None,
        "no_room",
    ]
    assert [req().info()["status"] for req in IN_STATE.values()] == [
        *["skipped"] * 3,
        "compressed",
        "skipped",
    ]
    req = compressed()
    req.shorten_tape(100)
    req.take_answer(30)
    assert (req.budget, req.answer_compressed, req.slots_freed) == (100, 30, 1000 + 30 - 100)
    assert exact_for_now().window is not None and compressed().window is None
