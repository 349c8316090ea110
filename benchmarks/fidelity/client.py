# SPDX-License-Identifier: Apache-2.0
"""Asks a running server of lava-sglang for greedy answers to prompts of token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx


class Reply(NamedTuple):
    text: str
    output_ids: list[int]
    cached_tokens: int  # of the prompt, found in the radix tree
    compressed: bool
    kept_tokens: int  # slots of the suffix after compression; the prompt's length without it
    reason: str  # why it was not compressed, or empty


class ServerClient:
    """For a `with` block; one connection, no proxy between."""

    def __init__(self, url: str, timeout_seconds: float = 1800):
        self._http = httpx.Client(base_url=url, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, kv_compression: Mapping[str, Any]
    ) -> Reply:
        """Raises httpx.HTTPStatusError with the server's message if it refuses."""
        sampling = {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "custom_params": {"kv_compression": dict(kv_compression)},
        }
        body = {"input_ids": list(prompt), "sampling_params": sampling}
        answer = self._post("/generate", json=body).json()
        info = answer["meta_info"]["kv_compression"]
        return Reply(
            text=answer["text"],
            output_ids=answer["output_ids"],
            cached_tokens=answer["meta_info"]["cached_tokens"],
            compressed=info["status"] == "compressed",
            kept_tokens=info.get("kept_tokens", len(prompt)),
            reason=info.get("reason", ""),
        )

    def scope(self) -> str:
        """What the server compresses: "suffix" or "prompt"."""
        info = self._http.get("/server_info").raise_for_status().json()
        config = json.loads(info.get("kv_compression_config") or "{}")
        return str(config.get("scope", "suffix"))

    def flush_cache(self) -> None:
        """Empty the radix tree; waits for requests that have not left the scheduler yet."""
        self._post("/flush_cache", params={"timeout": 60})

    def _post(self, path: str, **options: Any) -> httpx.Response:
        response = self._http.post(path, **options)
        if response.is_error:
            raise httpx.HTTPStatusError(
                f"{path}: {response.status_code} {response.text}",
                request=response.request,
                response=response,
            )
        return response
