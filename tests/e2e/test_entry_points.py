# SPDX-License-Identifier: Apache-2.0
"""The ways in besides `python -m sglang.launch_server`: `sglang serve` with a configuration file,
the OpenAI routes, the frontend language, and `sgl.Engine`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from lava_sglang.tools.server_process import Server
from tests.e2e import request_fuzzer
from tests.e2e.client import assert_no_leak, generate, info
from tests.e2e.prompts import cut

SGLANG = Path(sys.executable).with_name("sglang")
CPU = {"device": "cpu", "dtype": "float32", "max-total-tokens": 4096, "sleep-on-idle": True}

ENGINE = """
import json, sys
import sglang as sgl

def main():
    engine = sgl.Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", max_total_tokens=4096,
        kv_compression="lava", kv_compression_budget=0.5, kv_compression_min_tokens=100,
    )
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    off = {**params, "custom_params": {"kv_compression": {"enabled": False}}}
    prompt = json.loads(sys.argv[2])
    refused = []
    for custom_params in ({"kv_compression": {"budget": -1}}, {"kv_compression": "x"}):
        bad = {**params, "custom_params": custom_params}
        try:
            engine.generate(input_ids=prompt, sampling_params=bad)
        except ValueError as error:
            refused.append(str(error))
    print("REFUSED", json.dumps(refused))
    engine.generate(input_ids=prompt, sampling_params={**params, "custom_params": "x"})
    found = [engine.generate(input_ids=prompt, sampling_params=p) for p in (params, off)]
    print("FOUND", json.dumps([f["meta_info"]["kv_compression"] for f in found]))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


class Engine(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="module")
def engine(
    model_dir: Path, tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    (prompt,) = cut(tokens, [300], 93_000)
    folder = tmp_path_factory.mktemp("engine")
    (folder / "engine.py").write_text(ENGINE)
    command = [sys.executable, str(folder / "engine.py"), str(model_dir), json.dumps(prompt)]
    # To a file: nobody reads a pipe until the server's tests are done.
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        yield Engine(running, folder / "log")
        running.kill()
        running.wait()


@pytest.fixture(scope="module")
def server(
    engine: Engine, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Starts beside the engine: each keeps one core busy until it is up."""
    config = {
        **CPU,
        "kv-compression": "adakv",
        "kv-compression-min-tokens": 100,
        "kv-compression-config": {"window_size": 16, "scope": "prompt"},
    }
    path = tmp_path_factory.mktemp("config") / "server.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    # `sglang serve` wants the model on the command line.
    arguments = ["--model-path", str(model_dir), "--config", str(path)]
    with Server(arguments, command=(str(SGLANG), "serve")) as running:
        yield running


def test_sglang_serve_with_a_configuration_file(server: Server, tokens: list[int]) -> None:
    (prompt,) = cut(tokens, [200], 90_000)
    found = info(generate(server.url, prompt, 4))
    assert (found["method"], found["status"], found["kept_tokens"]) == ("adakv", "compressed", 50)
    args = server.server_info()
    assert args["kv_compression"] == "adakv"
    assert args["kv_compression_config"] == {"window_size": 16, "scope": "prompt"}


def test_the_openai_routes_take_settings(server: Server, tokens: list[int], oracle: Any) -> None:
    text = oracle.tokenizer.decode(tokens[91_000:91_200])
    body = {
        "model": "demo",
        "max_tokens": 4,
        "custom_params": {"kv_compression": {"budget": 40}},
    }
    chat = {**body, "messages": [{"role": "user", "content": text}], "return_meta_info": True}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=120).json()
    assert response["choices"][0]["meta_info"]["kv_compression"]["kept_tokens"] == 40
    before = total(server, "compressed")
    completion = httpx.post(
        f"{server.url}/v1/completions", json={**body, "prompt": text}, timeout=120
    )
    assert completion.status_code == 200
    assert total(server, "compressed") == before + 1


def total(server: Server, outcome: str) -> int:
    stats = server.server_info()["internal_states"][0]["kv_compression_stats"]
    return int(stats["requests"][outcome])


def test_the_frontend_language_takes_settings(
    server: Server, tokens: list[int], oracle: Any
) -> None:
    import sglang as sgl

    from lava_sglang.frontend import LavaRuntimeEndpoint

    text = oracle.tokenizer.decode(tokens[92_000:92_300])

    @sgl.function
    def program(s: Any, text: str) -> None:
        s += text
        s += sgl.gen("answer", max_tokens=6, temperature=0)

    found = []
    for settings in ({"enabled": False}, {"budget": 0.2}):
        backend = LavaRuntimeEndpoint(server.url, kv_compression=settings)
        state = program.run(text=text, backend=backend)
        found.append(state.get_meta_info("answer")["kv_compression"]["status"])
    assert found == ["skipped", "compressed"]


def test_the_engine_takes_settings(engine: Engine) -> None:
    engine.process.wait(timeout=400)
    output = engine.log.read_text()
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == 1, output[-6000:]
    on, off = json.loads(lines[0].removeprefix("FOUND "))
    assert (on["method"], on["status"], on["kept_tokens"]) == ("lava", "compressed", 150)
    assert (off["status"], off["reason"]) == ("skipped", "disabled")
    (refused,) = [line for line in output.splitlines() if line.startswith("REFUSED ")]
    messages = json.loads(refused.removeprefix("REFUSED "))
    assert ["accepts a fraction" in messages[0], "accepts an object" in messages[1]] == [True] * 2


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}),
        (
            "/api/chat",
            {
                "messages": [{"role": "user", "content": "Hello"}],
                "stream": False,
                "options": {"num_predict": 4},
            },
        ),
        ("/api/generate", {"prompt": "Hello", "stream": False, "options": {"num_predict": 4}}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
    ],
)
def test_routes_that_take_no_settings_say_so(
    server: Server, route: str, body: dict[str, Any]
) -> None:
    """They would drop them, and compress a request that asked not to be."""
    body = {"model": server.server_info()["served_model_name"], **body}
    off = {"custom_params": {"kv_compression": {"enabled": False}}}
    refused = httpx.post(server.url + route, json={**body, **off}, timeout=60)
    assert refused.status_code == 400
    assert f"{route} takes no settings, accepted by /generate" in refused.text
    assert httpx.post(server.url + route, json=body, timeout=60).status_code == 200


def test_no_settings_that_a_client_sends_hurt_the_server(server: Server, tokens: list[int]) -> None:
    """More: LAVA_FUZZ_REQUESTS=5000 make test ARGS="tests/e2e -k hurt"."""
    count = int(os.environ.get("LAVA_FUZZ_REQUESTS", "150"))
    statuses = request_fuzzer.run(server.url, seed=1, count=count)
    assert statuses[200] > count // 10 and statuses[400] > count // 10
    (prompt,) = cut(tokens, [300], 95_000)
    assert len(generate(server.url, prompt, 4)["output_ids"]) == 4
    server.flush_cache()
    assert_no_leak(server.url)
