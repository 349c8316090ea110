# SPDX-License-Identifier: Apache-2.0
"""The client of a server: its answers, its counters, its settings. Does not import SGLang."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from lava_sglang.config import KVCompressionConfig

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

Answer = dict[str, Any]
"""What `/generate` says of one prompt: text, output_ids, meta_info."""

OFF = {"enabled": False}
"""The `kv_compression` settings of a request that wants none."""


def generate_body(
    prompt: Sequence[int],
    max_new_tokens: int,
    kv_compression: Mapping[str, Any] | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """What `/generate` takes for a greedy answer to token ids.

    kv_compression: the request's own settings; None for the server's. sampling: further sampling
    parameters, which win. fields: of the request itself.
    """
    parameters: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens}
    if kv_compression is not None:
        parameters["custom_params"] = {"kv_compression": dict(kv_compression)}
    parameters |= sampling or {}
    return {"input_ids": list(prompt), "sampling_params": parameters, **fields}


class ServerClient:
    """For a `with` block. There is no proxy between: a server of ours is on this machine.

    Every call raises httpx.HTTPStatusError, with what the server says, where the server refuses.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 1800,
        transport: httpx.BaseTransport | None = None,
    ):
        self.http = httpx.Client(
            base_url=url, timeout=timeout_seconds, trust_env=False, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.http.close()

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        kv_compression: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Answer:
        """The answer to token ids. more: as `generate_body` takes it."""
        body = generate_body(prompt, max_new_tokens, kv_compression, **more)
        answer: Answer = self._request("POST", "/generate", json=body).json()
        return answer

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        kv_compression: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Iterator[Answer]:
        """The same answer while it grows. Leaving the iterator aborts the request."""
        body = generate_body(prompt, max_new_tokens, kv_compression, stream=True, **more)
        with self.http.stream("POST", "/generate", json=body) as response:
            if response.is_error:
                response.read()
                checked(response)
            for line in response.iter_lines():
                yield from events([line])

    def chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int, **fields: Any) -> Any:
        """A greedy reply of the OpenAI route. fields: further ones of its body."""
        body = {"model": "default", "messages": list(messages), "max_tokens": max_tokens}
        return self._request(
            "POST", "/v1/chat/completions", json={**body, "temperature": 0, **fields}
        ).json()

    def is_ready(self) -> bool:
        """False until the server has answered its warm-up request; then it generates one token."""
        try:
            return self.http.get("/health_generate", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def server_info(self) -> dict[str, Any]:
        """`/server_info`: the resolved arguments and the state of every scheduler."""
        info: dict[str, Any] = self._request("GET", "/server_info").json()
        return info

    def compression_stats(self) -> list[dict[str, Any]]:
        """Our totals, one for each data-parallel replica, by rank; none of a stock server."""
        states = self.server_info().get("internal_states") or []
        found = [stats for state in states if (stats := state.get("kv_compression_stats"))]
        return sorted(found, key=lambda stats: int(stats.get("dp_rank") or 0))

    def settings(self) -> dict[str, Any]:
        """What the server was started with: the config, a JSON object, and the least tokens."""
        info = self.server_info()
        names = ("kv_compression_config", "kv_compression_min_tokens")
        return {name: info.get(name) for name in names}

    def scope(self) -> str:
        """What the server compresses: "suffix", "prompt" or "auto"."""
        config = self.settings()["kv_compression_config"] or {}
        return str(config.get("scope", KVCompressionConfig().scope))

    def loads(self) -> list[dict[str, Any]]:
        """`/v1/loads`, one for each data-parallel replica."""
        loads: list[dict[str, Any]] = self._request("GET", "/v1/loads", params=_CORE).json()[
            "loads"
        ]
        return loads

    def metrics(self) -> list[Sample]:
        """`/metrics`, for which the server needs --enable-metrics: name, labels, value."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self._request("GET", "/metrics", follow_redirects=True).text
        return [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def flush_cache(self) -> None:
        """Empty the radix tree; waits for requests that have not left the scheduler yet."""
        self._request("POST", "/flush_cache", params={"timeout": 60})

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return checked(self.http.request(method, path, **options))


class AsyncServerClient:
    """Many streams at once, for an `async with` block: a connection each."""

    def __init__(self, url: str, timeout_seconds: float = 1800):
        """timeout_seconds: the longest silence on a stream."""
        self.http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """As `ServerClient.stream`, of what `generate_body` made."""
        async with self.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            if response.is_error:
                await response.aread()
                checked(response)
            async for line in response.aiter_lines():
                for event in events([line]):
                    yield event

    async def loads(self) -> list[dict[str, Any]]:
        response = checked(await self.http.get("/v1/loads", params=_CORE))
        loads: list[dict[str, Any]] = response.json()["loads"]
        return loads


_CORE = {"include": "core"}


def events(lines: Iterable[str]) -> Iterator[Answer]:
    """The messages in lines of a server's event stream."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def checked(response: httpx.Response) -> httpx.Response:
    """The response. Raises httpx.HTTPStatusError with the server's message if it refused."""
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{response.request.url.path}: {response.status_code} {response.text}",
            request=response.request,
            response=response,
        )
    return response
