# SPDX-License-Identifier: Apache-2.0
"""Freed slots become admitted requests: long prompts that do not fit together uncompressed."""

from collections.abc import Iterator

import pytest

from lava_sglang.tools.load import measure_concurrency
from lava_sglang.tools.server_process import Server
from tests.e2e.client import assert_no_leak
from tests.e2e.conftest import StartServer
from tests.e2e.prompts import cut

POOL = 4096  # slots
PROMPTS = [1960, 1980, 2000, 2000, 2010, 1990, 2020]  # tokens
BUDGET = 0.125


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[Server]:
    with start_server(
        *("--kv-compression", "snapkv", "--max-total-tokens", str(POOL)),
        *("--chunked-prefill-size", "1024"),
    ) as running:
        yield running


def test_three_times_as_many_requests_decode_at_once(server: Server, tokens: list[int]) -> None:
    prompts = cut(tokens, PROMPTS, 10_000)
    peaks = {}
    for enabled in (False, True):
        server.flush_cache()
        settings = {"enabled": enabled, "budget": BUDGET}
        result = measure_concurrency(
            server.url, prompts, kv_compression=settings, max_new_tokens=24, ignore_eos=True
        )
        assert [trace.tokens for trace in result.responses] == [24] * len(prompts)
        peaks[enabled] = result.peak_decoding
        print(
            f"compression {'on' if enabled else 'off'}: {result.peak_decoding} requests decode "
            f"at once, {result.peak_used_slots} slots held, {result.seconds:.0f} s"
        )
        assert_no_leak(server.url)
    assert peaks[True] >= 3 * peaks[False]
