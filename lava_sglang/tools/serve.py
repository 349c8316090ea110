# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang serve`: a server in the foreground, its log, and how to ask it once it is ready."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from lava_sglang.tools.server_process import Server, machine_options

_SHOW_SECONDS = 0.3
_QUESTION = {"messages": [{"role": "user", "content": "What is a radix tree?"}], "max_tokens": 64}


def run(model_path: str, port: int, server_args: Sequence[str]) -> None:
    """Serve until the server ends or Ctrl-C. Raises ServerError if it dies at start."""
    options = ["--model-path", model_path, *machine_options(), *server_args]
    server = Server(options, port=port)
    with server.log_path.open(encoding="utf-8", errors="replace") as log:

        def show_log(*_: object) -> None:
            print(log.read(), end="", flush=True)

        server.progress = show_log
        print(" ".join(["$", "python", *server.command[1:]]), flush=True)
        try:
            with server:
                show_log()
                print(
                    f"\nReady. Ctrl-C stops it. Ask it in another terminal:\n{curl(server.url)}\n"
                )
                while server.running:
                    show_log()
                    time.sleep(_SHOW_SECONDS)
        except KeyboardInterrupt:
            print("\nStopped.")


def curl(url: str) -> str:
    """A command for the OpenAI route of the server at `url`."""
    return (
        f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps(_QUESTION)}'"
    )
