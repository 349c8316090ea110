# SPDX-License-Identifier: Apache-2.0
"""Requests whose compression settings are anything that JSON can say, on every generating route.

Each is answered, or refused with a message about what was sent; the server goes on.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import httpx

TAKES_SETTINGS = ("/generate", "/v1/completions", "/v1/chat/completions", "/invocations")
TAKES_NONE = ("/v1/messages", "/v1/responses", "/api/chat", "/api/generate")

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "0.5", "0.5,0.25", "1e999", "nan"),
    *("\ud800", "\x00", "é" * 40, "x" * 3000, "lava", "none", "snapkv", "streamingllm"),
)
FIELDS = ("enabled", "method", "budget", "bugdet", "window_size", "\ud800", "")


def anything(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.6:
        return rng.choice(SCALARS)
    if kind < 0.8:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(FIELDS)): anything(rng, depth - 1) for _ in range(rng.randrange(4))}


def custom_params(rng: random.Random) -> Any:
    """Anything, or more often settings that are almost right."""
    kind = rng.random()
    if kind < 0.2:
        return anything(rng)
    if kind < 0.4:
        return {"kv_compression": anything(rng)}
    good = {"enabled": [True, False], "method": ["lava", "snapkv"], "budget": [0.5, 40, [0.5, 0.2]]}
    settings = {}
    for name, values in good.items():
        if rng.random() < 0.6:
            settings[name] = rng.choice(values) if rng.random() < 0.5 else anything(rng, 2)
    return {"kv_compression": settings}


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body that SGLang accepts but for what is in the custom parameters."""
    route = rng.choice(TAKES_SETTINGS * 3 + TAKES_NONE)
    text = "Hello there. " * rng.choice([1, 1, 30])
    messages = [{"role": "user", "content": text}]
    params = custom_params(rng)
    stream = rng.random() < 0.4
    if route == "/generate":
        one = {"max_new_tokens": 2, "temperature": 0, "custom_params": params}
        if rng.random() < 0.5:
            return route, {"text": text, "sampling_params": one, "stream": stream}
        plain = {"max_new_tokens": 2}
        both = [plain, one] if rng.random() < 0.5 else [one, plain]
        return route, {"text": [text, "b"], "sampling_params": both, "stream": stream}
    body: dict[str, Any] = {"model": "demo", "custom_params": params, "stream": stream}
    if route == "/v1/completions":
        return route, {**body, "prompt": text, "max_tokens": 2, "n": rng.choice([1, 2])}
    if route == "/api/generate":
        return route, {**body, "prompt": text, "options": {"num_predict": 2}}
    if route == "/api/chat":
        return route, {**body, "messages": messages, "options": {"num_predict": 2}}
    if route == "/v1/responses":
        del body["model"]  # it looks for its model
        return route, {**body, "input": text, "max_output_tokens": 2}
    return route, {**body, "messages": messages, "max_tokens": 2}


def run(url: str, seed: int, count: int) -> dict[int, int]:
    """Sends `count` requests. Returns how many had each status; AssertionError for an odd one."""
    rng = random.Random(seed)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for i in range(count):
            route, body = request(rng)
            content = json.dumps(body)  # with what strict JSON has no word for
            headers = {"Content-Type": "application/json"}
            response = client.post(route, content=content, headers=headers)
            shown = f"seed {seed}, request {i}: {route} {content[:400]}: {response.text[:400]}"
            assert response.status_code in (200, 400, 422), f"{response.status_code} {shown}"
            assert response.status_code != 400 or response.text, shown
            assert '"code":500' not in response.text.replace(" ", ""), shown
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    return statuses


if __name__ == "__main__":
    print(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
