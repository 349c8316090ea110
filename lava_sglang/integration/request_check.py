# SPDX-License-Identifier: Apache-2.0
"""What a request asks for is checked where it arrives, before its answer begins.

The scheduler checks it too, and its refusal ends the request with an error; but a streamed answer
has begun by then, with status 200. Here a bad setting is a 400 on every route. The routes whose
protocols have no custom parameters drop what they do not know: they refuse settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi.responses import ORJSONResponse
from sglang.srt.runtime_context import get_memory

from lava_sglang.config import REQUEST_KEY, KVCompressionError
from lava_sglang.integration.args import config_of

ROUTES = "/generate, /v1/completions, /v1/chat/completions"
"""The routes that take settings, as an answer names them."""


def settings_error(custom_params: Any) -> str | None:
    """Why the server refuses a request with these `custom_params`; None if it serves it."""
    if not isinstance(custom_params, dict) or REQUEST_KEY not in custom_params:
        return None
    config = config_of(get_memory())
    if not config.enabled:
        return None
    try:
        config.for_custom_params(custom_params)
    except KVCompressionError as error:
        return str(error)
    return None


def check_generate(original: Any, body: Any) -> Any:
    """AROUND hook on the check of a `/generate` body: a refusal, in SGLang's form, or None."""
    refusal = original(body)
    for custom_params in _custom_params(body) if refusal is None else ():
        message = settings_error(custom_params)
        if message is not None:
            return _error(message)
    return refusal


def _custom_params(body: Any) -> Iterator[Any]:
    """Those of each request of a `/generate` body, or of a Vertex AI one, which wraps them."""
    if isinstance(body, dict) and isinstance(body.get("parameters"), dict):
        body = body["parameters"]
    sampling_params = body.get("sampling_params") if isinstance(body, dict) else None
    for one in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        if isinstance(one, dict):
            yield one.get("custom_params")


def check_openai(original: Any, serving: Any, request: Any) -> str | None:
    """AROUND hook on `_validate_request` of an OpenAI route: a message, or None."""
    message: str | None = original(serving, request)
    return message or settings_error(getattr(request, "custom_params", None))


async def refuse_settings(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND hook on the handler of a route whose protocol has no custom parameters."""
    body = await raw_request.json()
    custom_params = body.get("custom_params") if isinstance(body, dict) else None
    if isinstance(custom_params, dict) and REQUEST_KEY in custom_params:
        path = raw_request.url.path
        message = f"custom_params.{REQUEST_KEY}: {path} takes no settings, accepted by {ROUTES}"
        return ORJSONResponse({"error": _error(message)}, HTTPStatus.BAD_REQUEST)
    return await original(serving, request, raw_request)


def _error(message: str) -> dict[str, Any]:
    return {
        "message": message,
        "type": "invalid_request_error",
        "code": HTTPStatus.BAD_REQUEST.value,
        "retryable": False,
    }
