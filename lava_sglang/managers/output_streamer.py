# SPDX-License-Identifier: Apache-2.0
"""Sends each finished request's compression info with its last output."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from lava_sglang.managers.request import LavaReq

INFO_KEY = "kv_compression"
"""The key in a response's `meta_info`."""


class LavaOutputStreamer(SchedulerOutputStreamer):
    """SGLang's `SchedulerOutputStreamer`, with one info object per finished request."""

    __slots__ = ()
    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[LavaReq]) -> dict[str, list[Any]]:
        """One list per request, extended over its outputs: empty until the last one."""
        return {INFO_KEY: [[req.info()] if req.finished() else [] for req in reqs]}

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == INFO_KEY or super().is_request_level_customized_info_key(key)


def set_info(
    original: Any, meta_info: dict[str, Any], state: Any, key: str, values: list[Any]
) -> None:
    """AROUND hook on `TokenizerManager._accumulate_request_meta_info`.

    SGLang accumulates lists, one value a token; ours is one object a request.
    """
    if key != INFO_KEY:
        original(meta_info, state, key, values)
    elif values:
        meta_info[key] = values[-1]
