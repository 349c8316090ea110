# SPDX-License-Identifier: Apache-2.0
"""Invariants 1, 2, 4 and 5 where positions are three numbers a token, and prompts hold images.

One server of a small random Qwen2.5-VL, prompts in chunks of 256. What is exact is the oracle's
too: a second server of it, stock, would take most of a minute to import SGLang's models.
"""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e.client import Response, assert_no_leak, generate, generate_all, info
from tests.e2e.conftest import MAX_NEW_TOKENS, WINDOW, StartServer
from tests.oracle import assert_same_tokens
from tests.oracle_images import ImageOracle
from tests.oracle_keep import KEEP
from tests.unit.tiny_llama import random_tokens
from tests.unit.tiny_vision import IMAGE, random_image, write_tiny_qwen2_5_vl

LENGTHS = [110, 150, 190, 230, 300, 520, 900]  # tokens
METHODS = ["lava", "snapkv"]
BUDGETS = [0.25, 64, 0.5]
OPTIONS = ("--max-total-tokens", "8192", "--chunked-prefill-size", "256")
OFF: dict[str, Any] = {"enabled": False}


class Prompt(NamedTuple):
    """A text with a placeholder for each image; what an image takes differs from its size."""

    text: str
    sizes: list[tuple[int, int]]  # of the images, pixels
    seed: int

    @property
    def images(self) -> list[Any]:
        return [random_image(*size, self.seed + i) for i, size in enumerate(self.sizes)]


def words(count: int, seed: int) -> str:
    """So many letters, which are tokens."""
    return "".join(chr(97 + token % 26) for token in random_tokens(count, seed))


IMAGE_PROMPTS = [
    Prompt(words(20, 1) + IMAGE + words(120, 2), [(112, 84)], 10),
    Prompt(words(90, 3) + IMAGE + words(40, 4) + IMAGE + words(60, 5), [(140, 280), (84, 84)], 20),
    # An image of 192 tokens on both sides of a chunk's end; the next one lies in the window.
    Prompt(words(200, 6) + IMAGE + words(30, 7) + IMAGE + words(9, 8), [(448, 336), (56, 56)], 30),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2_5_vl(tmp_path_factory.mktemp("qwen2.5-vl"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> ImageOracle:
    return ImageOracle(model)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_tokens(length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def server(start_server: StartServer, model: Path) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "lava", "--kv-compression-min-tokens", "100", *OPTIONS), model=model
    ) as running:
        yield running
        assert_no_leak(running.url)


def ask(url: str, prompt: Prompt, compression: dict[str, Any] | None = None) -> Response:
    data = []
    for image in prompt.images:
        file = io.BytesIO()
        image.save(file, "PNG")
        data.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return generate(url, prompt.text, MAX_NEW_TOKENS, compression, image_data=data)


def check(oracle: ImageOracle, ids: list[int], response: Response, method: str | None) -> None:
    """method: None where the prompt is exact."""
    found = info(response)
    prefill = oracle.prefill(ids, WINDOW)
    keep = None
    assert found["status"] == ("skipped" if method is None else "compressed")
    if method is not None:
        assert found["prompt_tokens"] == len(ids)
        shared = found["shared_prefix_tokens"]
        assert found["slots_freed"] == len(ids) - shared - found["kept_tokens"] > 0
        keep = KEEP[method](prefill, shared, found["kept_tokens"], WINDOW)
    steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
    excused = assert_same_tokens(steps, response["output_ids"])
    print(len(ids), method, found.get("kept_tokens"), [f"step {s}: {g:.1e}" for s, g in excused])


def test_text_is_the_oracles_and_exact_where_nothing_is_dropped(
    server: Server, oracle: ImageOracle, prompts: list[list[int]]
) -> None:
    methods, budgets = cycle(METHODS), cycle(BUDGETS)
    settings = [{"method": next(methods), "budget": next(budgets)} for _ in prompts]
    responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
    for prompt, chosen, response in zip(prompts, settings, responses, strict=True):
        check(oracle, prompt, response, str(chosen["method"]))
    server.flush_cache()
    exact: dict[str, Any] = {"disabled": OFF, "budget_covers_suffix": {"budget": 1.0}}
    for reason, chosen in exact.items():
        again = generate_all(server.url, prompts, MAX_NEW_TOKENS, [chosen] * len(prompts))
        for prompt, response in zip(prompts, again, strict=True):
            assert info(response)["reason"] == reason
            check(oracle, prompt, response, None)
    assert any(a["output_ids"] != b["output_ids"] for a, b in zip(responses, again, strict=True))


def test_a_shared_prefix_stays_exact(server: Server, oracle: ImageOracle) -> None:
    server.flush_cache()
    document = random_tokens(333, 50)
    prompts = [document + random_tokens(120, 51 + i) for i in range(3)]
    methods = cycle(METHODS)
    shared = []
    for prompt in prompts:
        method = next(methods)
        settings = {"method": method, "budget": 0.4}
        response = generate(server.url, prompt, MAX_NEW_TOKENS, settings)
        check(oracle, prompt, response, method)
        shared.append(info(response)["shared_prefix_tokens"])
    assert shared == [0, len(document), len(document)]


def test_prompts_with_images(server: Server, oracle: ImageOracle, prompts: list[list[int]]) -> None:
    """In one batch with prompts of text, which have no shift of their own. The second time the tree
    holds the prompts, images too, and all but the window comes from there."""
    for method, again in (("lava", False), ("snapkv", True)):
        chosen = {"method": method, "budget": 0.3}
        with ThreadPoolExecutor(1 + len(IMAGE_PROMPTS)) as pool:
            texts = pool.submit(generate_all, server.url, prompts[3:5], 60, [chosen] * 2)
            answers = [pool.submit(ask, server.url, prompt, chosen) for prompt in IMAGE_PROMPTS]
        for prompt, answer in zip(IMAGE_PROMPTS, answers, strict=True):
            response = answer.result()
            with oracle.seeing(prompt.text, prompt.images) as ids:
                check(oracle, ids, response, method)
                if again:
                    assert response["meta_info"]["cached_tokens"] == len(ids) - WINDOW
        assert {info(response)["status"] for response in texts.result()} == {"compressed"}
    for prompt in IMAGE_PROMPTS:
        response = ask(server.url, prompt, OFF)
        with oracle.seeing(prompt.text, prompt.images) as ids:
            check(oracle, ids, response, None)


def test_another_image_is_another_prompt(server: Server, oracle: ImageOracle) -> None:
    """Two questions about one image share its entries; the same words about another one do not."""
    server.flush_cache()
    before, about = words(150, 60), words(130, 61)
    first = Prompt(before + IMAGE + words(130, 62), [(112, 112)], 70)
    same = Prompt(before + IMAGE + about, [(112, 112)], 70)
    other = Prompt(before + IMAGE + about, [(112, 112)], 80)
    shared = []
    for prompt in (first, same, other):
        response = ask(server.url, prompt, {"method": "lava", "budget": 0.4})
        with oracle.seeing(prompt.text, prompt.images) as ids:
            check(oracle, ids, response, "lava")
        shared.append(info(response)["shared_prefix_tokens"])
    image_end = len(before) + 1 + 16 + 1  # with what stands before it and behind it
    assert shared[0] == 0
    assert shared[1] >= image_end
    assert shared[2] == len(before) + 1
