# SPDX-License-Identifier: Apache-2.0
"""SGLang's frontend language with per-program compression settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.ir import SglSamplingParams


class LavaRuntimeEndpoint(RuntimeEndpoint):
    """`sgl.RuntimeEndpoint` (lang/backend/runtime_endpoint.py) that sends `kv_compression`.

    A program's calls take the settings of the backend it runs on:

        exact = LavaRuntimeEndpoint(url, kv_compression={"enabled": False})
        small = LavaRuntimeEndpoint(url, kv_compression={"budget": 0.1})
        answer = program.run(question=..., backend=small)

    A subclass, since the frontend's sampling parameters have no custom ones. kv_compression: the
    same object as `custom_params["kv_compression"]` of `/generate`; the server checks it.
    """

    def __init__(self, base_url: str, kv_compression: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(base_url, **kwargs)
        self.kv_compression = dict(kv_compression)

    def generate(self, s: Any, sampling_params: SglSamplingParams) -> Any:
        return super().generate(s, self._with_settings(sampling_params))

    def generate_stream(self, s: Any, sampling_params: SglSamplingParams) -> Any:
        return super().generate_stream(s, self._with_settings(sampling_params))

    def _with_settings(self, sampling_params: SglSamplingParams) -> Any:
        return _CompressedSamplingParams(sampling_params, self.kv_compression)


class _CompressedSamplingParams:
    """Sampling parameters that send one key more; every other attribute is the original's."""

    def __init__(self, sampling_params: SglSamplingParams, kv_compression: dict[str, Any]):
        self.__dict__.update(_sampling_params=sampling_params, _kv_compression=kv_compression)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampling_params, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampling_params, name, value)

    def to_srt_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = self._sampling_params.to_srt_kwargs()
        return {**kwargs, "custom_params": {"kv_compression": self._kv_compression}}
