# SPDX-License-Identifier: Apache-2.0
"""A bad setting is a 400 before an answer begins, whatever route it comes by."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints import api_contract
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

from lava_sglang.integration import request_check

BAD = {"kv_compression": {"budget": -1}}
GOOD = {"kv_compression": {"budget": 0.5}}
MESSAGE = "kv_compression.budget=-1: accepts a fraction"

pytestmark = pytest.mark.usefixtures("plugin_installed")


@pytest.fixture(params=["lava", "none"])
def method(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the server was started with; without a method nothing is checked."""
    fields = {
        "kv_compression": request.param,
        "kv_compression_budget": 0.25,
        "kv_compression_min_tokens": 512,
        "kv_compression_config": None,
    }
    monkeypatch.setattr(request_check, "get_memory", lambda: SimpleNamespace(**fields))
    yield request.param


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda custom: {"text": "a", "sampling_params": {"custom_params": custom}},
        lambda custom: {
            "text": ["a", "b"],
            "sampling_params": [{"custom_params": GOOD}, {"custom_params": custom}],
        },
    ],
    ids=["one", "the second of a batch"],
)
def test_generate(method: str, wrap: Any, stream: bool) -> None:
    body = {**wrap(BAD), "stream": stream}
    error = api_contract.generate_contract_error(body)
    if method == "none":
        assert error is None
    else:
        assert error is not None and MESSAGE in error["message"]  # type: ignore[index,call-overload]
    assert api_contract.generate_contract_error({**wrap(GOOD), "stream": stream}) is None


def test_sglangs_own_refusal_comes_first(method: str) -> None:
    body = {"text": 3, "sampling_params": {"custom_params": BAD}}
    assert isinstance(api_contract.generate_contract_error(body), str)


@pytest.mark.parametrize(
    "body", [None, [], "x", {}, {"sampling_params": 3}, {"sampling_params": [None, 3]}], ids=repr
)
def test_a_body_of_any_shape_is_looked_at(body: Any) -> None:
    assert [custom for custom in request_check._custom_params(body) if custom] == []


def test_a_vertex_body_is_looked_into() -> None:
    body = {"instances": [], "parameters": {"sampling_params": {"custom_params": BAD}}}
    assert list(request_check._custom_params(body)) == [BAD]


@pytest.mark.parametrize("serving", [OpenAIServingChat, OpenAIServingCompletion])
def test_chat_and_completions(method: str, serving: Any) -> None:
    assert serving._validate_request.__wrapped__ is not None
    make = chat_request if serving is OpenAIServingChat else completion_request

    def check(custom_params: Any) -> str | None:
        return request_check.check_openai(lambda *_: None, None, make(custom_params))

    if method == "none":
        assert check(BAD) is None
    else:
        assert MESSAGE in (check(BAD) or "")
    assert check(GOOD) is None and check(None) is None
    first = request_check.check_openai(lambda *_: "its own", None, make(BAD))
    assert first == "its own"


def completion_request(custom_params: Any) -> Any:
    return CompletionRequest(model="m", prompt="a", stream=True, custom_params=custom_params)


def chat_request(custom_params: Any) -> Any:
    messages: Any = [{"role": "user", "content": "a"}]
    return ChatCompletionRequest(
        model="m", messages=messages, stream=True, custom_params=custom_params
    )


@pytest.mark.parametrize(
    ("serving", "handler", "path"),
    [
        (AnthropicServing, "handle_messages", "/v1/messages"),
        (OllamaServing, "handle_chat", "/api/chat"),
        (OllamaServing, "handle_generate", "/api/generate"),
        (OpenAIServingResponses, "create_responses", "/v1/responses"),
    ],
)
def test_routes_without_custom_parameters_refuse_settings(
    serving: Any, handler: str, path: str
) -> None:
    """They would drop them, and compress a request that asked not to be."""

    async def body() -> Any:
        return {"custom_params": {"kv_compression": {"enabled": False}}}

    raw: Any = SimpleNamespace(json=body, url=SimpleNamespace(path=path))
    response = asyncio.run(getattr(serving, handler)(None, None, raw))
    assert response.status_code == 400
    assert f"{path} takes no settings, accepted by /generate".encode() in response.body


def test_routes_without_settings_go_on() -> None:
    async def body() -> Any:
        return {"custom_params": {"other": 1}}

    async def original(*args: Any) -> str:
        return "answered"

    raw: Any = SimpleNamespace(json=body)
    assert asyncio.run(request_check.refuse_settings(original, None, None, raw)) == "answered"
