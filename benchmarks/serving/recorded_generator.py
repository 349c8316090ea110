# SPDX-License-Identifier: Apache-2.0
"""SGLang's load generator, `sglang.bench_serving`, with the times of every request written down.

    python recorded_generator.py TIMES_FILE [options of sglang.bench_serving]

Its own output has no start times, without which nothing says how many requests ran at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sglang.benchmark import serving

BACKEND = "sglang-oai-chat"


def main() -> None:
    times_path = Path(sys.argv.pop(1))
    requests: list[dict[str, Any]] = []
    original = serving.ASYNC_REQUEST_FUNCS[BACKEND]

    async def recorded(request_func_input: Any, pbar: Any = None) -> Any:
        output = await original(request_func_input, pbar)
        first_token = output.start_time + output.ttft
        requests.append(
            {
                "start": output.start_time,
                "first_token": first_token,
                "last_token": first_token + sum(output.itl),
                "prompt_tokens": output.prompt_len,
                "output_tokens": output.output_len,
                "error": None if output.success else output.error or "no answer",
            }
        )
        return output

    serving.ASYNC_REQUEST_FUNCS[BACKEND] = recorded
    serving.cli_main()
    times_path.write_text(json.dumps(requests))


if __name__ == "__main__":
    main()
