# SPDX-License-Identifier: Apache-2.0
"""The real model, the oracle over it, and real servers. A module shares one server.

Servers run float32: in bfloat16 two logits often tie exactly, and equality means nothing. They run
on the CPU, or with LAVA_TEST_DEVICE=cuda on a GPU; the oracle always runs on the CPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.demo_model import write_demo_model
from lava_sglang.tools.server_process import Server
from tests.e2e.client import beam_of, generate_all
from tests.e2e.prompts import cut, prose_tokens
from tests.oracle import Oracle, Prefill

PROJECT = Path(__file__).parents[2]
WINDOW = 32
MAX_NEW_TOKENS = 16
# Real prompts from 50 to 3,000 tokens, 20 of them above 100; the last ones take several chunks.
LENGTHS = [50, 80, 110, 130, 150, 170, 190, 210, 230, 260, 290, 320, 360, 400, 450, 520, 600, 700]
LENGTHS += [850, 1100, 1700, 3000]
BEAM_PROMPT = 2  # which of them beam search is asked, 110 tokens

# SGLang's own checks, after every step: slots that leak or belong to two owners end the server.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

# On a GPU: operators that take float32, and no TF32 in SGLang's Triton kernels.
DEVICE = os.environ.get("LAVA_TEST_DEVICE", "cpu")
DEVICE_OPTIONS = {
    "cpu": ["--device", "cpu", "--sleep-on-idle"],
    "cuda": ["--attention-backend", "triton", "--sampling-backend", "pytorch"],
}[DEVICE]
DEVICE_ENV = {"TRITON_F32_DEFAULT": "ieee", "SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}

StartServer = Callable[..., Any]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The demo model, converted on first use; LAVA_MODEL_DIR names another place."""
    directory = Path(os.environ.get("LAVA_MODEL_DIR", PROJECT / ".models" / "smollm2"))
    write_demo_model(directory, print)
    return directory


@pytest.fixture(scope="session")
def start_server(model_dir: Path) -> StartServer:
    """A context manager that serves the demo model, or another, with these options."""

    @contextmanager
    def start(
        *options: str, env: dict[str, str] | None = None, model: Path = model_dir
    ) -> Iterator[Server]:
        arguments = ["--model-path", str(model), "--dtype", "float32", "--enable-metrics"]
        arguments += [*DEVICE_OPTIONS, *options]
        with Server(
            arguments, env=STRICT | (DEVICE_ENV if DEVICE == "cuda" else {}) | (env or {})
        ) as server:
            yield server
            died = [line for line in server.log_tail(400) if "Scheduler hit an exception" in line]
            assert not died, "\n".join(server.log_tail(60))

    return start


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="session")
def tokens(oracle: Oracle) -> list[int]:
    return prose_tokens(oracle.tokenizer)


@pytest.fixture(scope="session")
def prompts(tokens: list[int]) -> list[list[int]]:
    return cut(tokens, LENGTHS)


@pytest.fixture(scope="session")
def prefills(oracle: Oracle, prompts: list[list[int]]) -> list[Prefill]:
    """The oracle's exact forward pass over each prompt."""
    return [oracle.prefill(prompt, WINDOW) for prompt in prompts]


class StockAnswers(NamedTuple):
    tokens: list[list[int]]  # to each of `prompts`
    beam: list[list[int]]  # to BEAM_PROMPT


@pytest.fixture(scope="session")
def stock_answers(start_server: StartServer, prompts: list[list[int]]) -> StockAnswers:
    """What SGLang without the plugin answers to `prompts`: only its CPU platform is loaded."""
    options = ("--max-total-tokens", "24576", "--chunked-prefill-size", "1024")
    with start_server(*options, env={"SGLANG_PLUGINS": "lava_cpu"}) as server:
        beam = beam_of(server.url, prompts[BEAM_PROMPT])
        responses = generate_all(server.url, prompts, MAX_NEW_TOKENS)
    assert all("kv_compression" not in response["meta_info"] for response in responses)
    return StockAnswers([response["output_ids"] for response in responses], beam)


@pytest.fixture(scope="session")
def stock_tokens(stock_answers: StockAnswers) -> list[list[int]]:
    return stock_answers.tokens
