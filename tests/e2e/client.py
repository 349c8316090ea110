# SPDX-License-Identifier: Apache-2.0
"""Sends prompts, of token ids or as text, to a server's /generate route."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

Response = dict[str, Any]


def generate(
    url: str,
    prompt: list[int] | str,
    max_new_tokens: int,
    compression: dict[str, Any] | None = None,
    **fields: Any,
) -> Response:
    """Greedy, to `max_new_tokens` exactly. `compression` goes into custom_params."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    if compression is not None:
        sampling["custom_params"] = {"kv_compression": compression}
    sampling.update(fields.pop("sampling", {}))
    kind = "text" if isinstance(prompt, str) else "input_ids"
    body = {kind: prompt, "sampling_params": sampling, **fields}
    response = httpx.post(f"{url}/generate", json=body, timeout=600)
    result: Response = response.json()
    return result


def generate_all(
    url: str,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    compressions: Sequence[dict[str, Any] | None] | None = None,
    parallel: int = 4,
    **fields: Any,
) -> list[Response]:
    """One response per prompt, in order; `parallel` are in flight at a time."""
    chosen = compressions or [None] * len(prompts)
    with ThreadPoolExecutor(parallel) as pool:
        return list(
            pool.map(
                lambda pair: generate(url, pair[0], max_new_tokens, pair[1], **fields),
                zip(prompts, chosen, strict=True),
            )
        )


def stream_events(
    url: str,
    prompt: list[int],
    settings: dict[str, Any],
    max_new_tokens: int,
    **fields: Any,
) -> Iterator[Response]:
    """The messages of a greedy answer of `max_new_tokens` while it is streamed."""
    sampling = {
        "temperature": 0,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
        "custom_params": {"kv_compression": settings},
    }
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, **fields}
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def beam_of(url: str, prompt: list[int], width: int = 3, tokens: int = 40) -> list[list[int]]:
    """The `width` best answers of a beam search, the best first."""
    response = generate(url, prompt, tokens, sampling={"beam_width": width, "n": width})
    return [beam["output_ids"] for beam in response["meta_info"]["beam_results"]]


def info(response: Response) -> dict[str, Any]:
    found: dict[str, Any] = response["meta_info"]["kv_compression"]
    return found


def stats(url: str) -> dict[str, Any]:
    """Of the first data-parallel replica."""
    return replica_stats(url)[0]


def replica_stats(url: str) -> list[dict[str, Any]]:
    """One for each data-parallel replica, by rank."""
    states = httpx.get(f"{url}/server_info", timeout=60).json()["internal_states"]
    return sorted((s["kv_compression_stats"] for s in states), key=lambda s: s["dp_rank"])


def metric(url: str, name: str) -> float:
    """Sum of a Prometheus series over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(name + "{")]
    assert values, f"no series {name}"
    return sum(float(value) for value in values)


def assert_no_leak(url: str) -> None:
    """Invariant 3, for an idle server: free + evictable slots == the pool."""
    for found in replica_stats(url):
        assert found["free_slots"] + found["evictable_slots"] == found["pool_slots"], found
        assert found["running_compressed_requests"] == 0
