# SPDX-License-Identifier: Apache-2.0
"""Asks a running server of lava-sglang about prompts of token ids: answers, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from lava_sglang.tools.forced_tokens import SHIFT, ForcedTokens


def settings_of(method: str, budget: float | None) -> dict[str, Any]:
    """What a request asks for; the whole prompt where there is no budget."""
    return {"enabled": False} if budget is None else {"method": method, "budget": budget}


def checked(response: httpx.Response, path: str) -> httpx.Response:
    """The response. Raises httpx.HTTPStatusError with the server's message if it refused."""
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{path}: {response.status_code} {response.text}",
            request=response.request,
            response=response,
        )
    return response


class Reply(NamedTuple):
    text: str
    output_ids: list[int]
    cached_tokens: int  # of the prompt, found in the radix tree
    compressed: bool
    kept_tokens: int  # slots of the suffix after compression; the prompt's length without it
    reason: str  # why it was not compressed, or empty


class ForcedReply(NamedTuple):
    """T tokens after the first, each after the true ones before it; k tokens watched at each."""

    watched: list[list[float]]  # log-probabilities [T, k]
    most_likely: list[float]  # log-probability [T] of the most likely token
    compressed: bool
    kept_tokens: int
    reason: str


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
        answer = self._generate(prompt, max_new_tokens, {"kv_compression": dict(kv_compression)})
        info = answer["meta_info"]["kv_compression"]
        return Reply(
            text=answer["text"],
            output_ids=answer["output_ids"],
            cached_tokens=answer["meta_info"]["cached_tokens"],
            compressed=info["status"] == "compressed",
            kept_tokens=info.get("kept_tokens", len(prompt)),
            reason=info.get("reason", ""),
        )

    def likely_tokens(
        self, prompt: Sequence[int], continuation: Sequence[int], count: int
    ) -> list[list[int]]:
        """The `count` most likely tokens at each of the continuation's but the first, the most
        likely first, each after the true ones before it: from an exact prefill of both."""
        answer = self._generate(
            [*prompt, *continuation],
            1,
            {"kv_compression": {"enabled": False}},
            return_logprob=True,
            logprob_start_len=len(prompt),
            top_logprobs_num=count,
        )
        found = answer["meta_info"]["input_top_logprobs"][1 - len(continuation) :]
        return [[token for _, token, _ in tokens] for tokens in found]

    def force(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        watched: Sequence[Sequence[int]],
        kv_compression: Mapping[str, Any],
    ) -> ForcedReply:
        """The server replies `tokens`, and tells log-probabilities on the way.

        watched: k token ids for each of `tokens` but the first. The server needs
        --enable-custom-logit-processor. Raises RuntimeError if it replied anything else.
        """
        free = set(range(len(watched[0]) + 1 + len(tokens))) - set(tokens)
        columns = sorted(free)[: len(watched[0]) + 1]
        params = {
            "kv_compression": dict(kv_compression),
            "forced_tokens": list(tokens),
            # The first token comes from the exact prompt: what is told there is not read.
            "watched_tokens": [token for row in [watched[0], *watched] for token in row],
            "watched_columns": columns,
        }
        answer = self._generate(
            prompt,
            len(tokens),
            params,
            ignore_eos=True,
            custom_logit_processor=ForcedTokens.to_str(),
            return_logprob=True,
            token_ids_logprob=columns,
        )
        if answer["output_ids"] != list(tokens):
            raise RuntimeError(f"the server replied {answer['output_ids']}, forced was {tokens}")
        info = answer["meta_info"]["kv_compression"]
        steps = answer["meta_info"]["output_token_ids_logprobs"][1:]
        told = [{token: value + SHIFT for value, token, _ in step} for step in steps]
        return ForcedReply(
            watched=[[step[column] for column in columns[:-1]] for step in told],
            most_likely=[step[columns[-1]] for step in told],
            compressed=info["status"] == "compressed",
            kept_tokens=info.get("kept_tokens", len(prompt)),
            reason=info.get("reason", ""),
        )

    def settings(self) -> dict[str, Any]:
        """What it was started with: the config, a JSON object, and the least tokens."""
        info = self._http.get("/server_info").raise_for_status().json()
        names = ("kv_compression_config", "kv_compression_min_tokens")
        return {name: info.get(name) for name in names}

    def scope(self) -> str:
        """What the server compresses: "suffix", "prompt" or "auto"."""
        config = self.settings()["kv_compression_config"] or {}
        return str(config.get("scope", "suffix"))

    def check_scope(self, needed: str) -> None:
        """Raises ValueError unless the server compresses `needed`."""
        if self.scope() != needed:
            raise ValueError(
                f"the server's scope={self.scope()!r}: needs {needed!r}, else a prompt that was "
                "sent before is found in the radix tree and stays exact. Start it with "
                f'--kv-compression-config \'{{"scope": "{needed}"}}\''
            )

    def flush_cache(self) -> None:
        """Empty the radix tree; waits for requests that have not left the scheduler yet."""
        self._post("/flush_cache", params={"timeout": 60})

    def _generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        custom_params: Mapping[str, Any],
        ignore_eos: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "custom_params": dict(custom_params),
        }
        if ignore_eos:
            sampling["ignore_eos"] = True
        body = {"input_ids": list(prompt), "sampling_params": sampling, **options}
        answer: dict[str, Any] = self._post("/generate", json=body).json()
        return answer

    def _post(self, path: str, **options: Any) -> httpx.Response:
        return checked(self._http.post(path, **options), path)
