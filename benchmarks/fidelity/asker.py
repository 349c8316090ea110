# SPDX-License-Identifier: Apache-2.0
"""Asks a server many samples at once: by its OpenAI chat route, or as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
from client import checked
from tasksets.sample import Sample

NOTHING_TO_DROP = ("too_short", "budget_covers_suffix")
"""Reasons why the answer of a whole prompt is the answer of the compressed one."""


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    compressed: bool
    kept_tokens: int  # slots of the prompt after compression; the prompt's length without it
    reason: str  # why it was not compressed, or empty


class Asker:
    """Greedy answers. `client` of httpx, with the server's URL."""

    def __init__(self, client: httpx.AsyncClient, template_options: Mapping[str, Any]):
        """template_options: variables of the model's chat template."""
        self.client = client
        self.template_options = dict(template_options)

    async def ask(self, sample: Sample, kv_compression: Mapping[str, Any]) -> Answer:
        """Raises httpx.HTTPStatusError with the server's message if it refuses, RuntimeError if it
        did not compress a prompt that it could have."""
        custom_params = {"kv_compression": dict(kv_compression)}
        if sample.raw:
            text, meta = await self._generate(sample, custom_params)
        else:
            text, meta = await self._chat(sample, custom_params)
        info = meta["kv_compression"]
        compressed, reason = info["status"] == "compressed", info.get("reason", "")
        wanted = kv_compression.get("enabled", True)
        if wanted and not compressed and reason not in NOTHING_TO_DROP:
            raise RuntimeError(
                f"{sample.task} {sample.name}: the server did not compress it: {reason}"
            )
        size = meta["prompt_tokens"]
        return Answer(text, size, compressed, info.get("kept_tokens", size), reason)

    async def _chat(
        self, sample: Sample, custom_params: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        messages = [{"role": "user", "content": sample.prompt}]
        if sample.reply_start:
            messages.append({"role": "assistant", "content": sample.reply_start})
        body = {
            "model": "default",
            "messages": messages,
            "continue_final_message": bool(sample.reply_start),
            "max_tokens": sample.max_new_tokens,
            "temperature": 0,
            "custom_params": custom_params,
            "chat_template_kwargs": self.template_options,
            "return_meta_info": True,
        }
        choice = (await self._post("/v1/chat/completions", body))["choices"][0]
        return choice["message"]["content"] or "", choice["meta_info"]

    async def _generate(
        self, sample: Sample, custom_params: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """SGLang's own route: that of OpenAI does not say whether a prompt was compressed."""
        sampling = {
            "temperature": 0,
            "max_new_tokens": sample.max_new_tokens,
            "custom_params": custom_params,
        }
        text = f"{sample.prompt} {sample.reply_start}" if sample.reply_start else sample.prompt
        answer = await self._post("/generate", {"text": text, "sampling_params": sampling})
        return answer["text"], answer["meta_info"]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        answer: dict[str, Any] = checked(response, path).json()
        return answer
