# SPDX-License-Identifier: Apache-2.0
"""A response carries one info object, with its last output and not before."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from lava_sglang.managers.output_streamer import INFO_KEY, LavaOutputStreamer, set_info


@pytest.fixture
def streamer() -> Any:
    return LavaOutputStreamer.__new__(LavaOutputStreamer)


def finished(info: dict[str, Any] | None) -> Any:
    return SimpleNamespace(finished=lambda: info is not None, info=lambda: info)


def test_only_finished_requests_send_their_info(streamer: Any) -> None:
    reqs = [finished(None), finished({"status": "compressed"}), finished(None)]
    assert streamer.build_additional_customized_info(reqs) == {
        INFO_KEY: [[], [{"status": "compressed"}], []]
    }
    assert streamer.build_additional_customized_info([]) == {INFO_KEY: []}


def test_sglang_asks_for_it(streamer: Any) -> None:
    assert isinstance(streamer, SchedulerOutputStreamer)
    assert streamer.has_additional_customized_info is True


def test_our_key_is_one_value_a_request_and_others_stay(streamer: Any) -> None:
    assert streamer.is_request_level_customized_info_key(INFO_KEY) is True
    stock = SchedulerOutputStreamer.__new__(SchedulerOutputStreamer)
    for key in ("logits", "hidden", ""):
        assert streamer.is_request_level_customized_info_key(
            key
        ) == stock.is_request_level_customized_info_key(key)


class Recorder:
    """In the place of SGLang's method, which appends one value a token."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


def test_the_info_is_an_object_and_not_a_list() -> None:
    original = Recorder()
    meta_info: dict[str, Any] = {}
    for values in ([], [], [{"status": "skipped"}]):
        set_info(original, meta_info, "state", INFO_KEY, values)
    assert meta_info == {INFO_KEY: {"status": "skipped"}}
    assert original.calls == []


def test_other_keys_go_sglangs_way() -> None:
    original = Recorder()
    meta_info: dict[str, Any] = {}
    set_info(original, meta_info, "state", "logits", [1, 2])
    assert original.calls == [(meta_info, "state", "logits", [1, 2])] and meta_info == {}


def test_the_hook_is_on_sglangs_method(plugin_installed: None) -> None:
    """Through SGLang's own call, other keys included."""
    meta_info: dict[str, Any] = {}
    state = SimpleNamespace(customized_info_accumulated={})
    TokenizerManager._accumulate_request_meta_info(meta_info, state, INFO_KEY, [{"a": 1}])
    assert meta_info == {INFO_KEY: {"a": 1}}
