# SPDX-License-Identifier: Apache-2.0
"""Invariants 3 and 5 with several schedulers: tensor-parallel ranks, data-parallel replicas.

Under tensor parallelism each rank chooses among its own heads. The demo model has 3 KV heads: one
a rank.
"""

import os

import torch

from lava_sglang.tools.server_process import Server
from tests.e2e.client import Response, assert_no_leak, generate, generate_all, info, replica_stats
from tests.e2e.conftest import MAX_NEW_TOKENS, WINDOW, StartServer
from tests.e2e.prompts import cut
from tests.oracle import Oracle, assert_same_tokens
from tests.oracle_keep import KEEP, per_rank_keep

TP_SIZE, DP_SIZE = 3, 2
OPTIONS = ["--kv-compression", "lava", "--kv-compression-min-tokens", "100"]
OPTIONS += ["--max-total-tokens", "4096", "--chunked-prefill-size", "256"]


def environment(ranks: int) -> dict[str, str]:
    """What SGLang's CPU engine wants for more ranks than the machine has NUMA nodes."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return {
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join([cores] * ranks),
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",  # of the embedding's mask, in every rank
    }


def totals(server: Server, name: str, rank: str, **labels: str) -> dict[str, float]:
    """A counter of each scheduler, by its `rank` label."""
    return {
        sample.labels[rank]: sample.value
        for sample in server.metrics()
        if sample.name == f"sglang:kv_compression_{name}_total"
        and labels.items() <= sample.labels.items()
    }


def freed(responses: list[Response]) -> int:
    return sum(info(response)["slots_freed"] for response in responses)


def test_each_rank_chooses_among_its_heads_and_frees_the_same_slots(
    start_server: StartServer, oracle: Oracle, tokens: list[int]
) -> None:
    prompts = cut(tokens, [150, 210, 290, 450], 40_000)
    methods = ["lava", "adakv", "pyramidkv", "snapkv"]
    settings = [{"method": method, "budget": 0.25} for method in methods]
    parallel = ["--tp", str(TP_SIZE), "--enable-metrics-for-all-schedulers"]
    with start_server(*OPTIONS, *parallel, env=environment(TP_SIZE)) as server:
        responses = generate_all(server.url, prompts, MAX_NEW_TOKENS, settings)
        exact = generate(server.url, prompts[3], MAX_NEW_TOKENS, {"enabled": False})
        counted = totals(server, "requests", "tp_rank", outcome="compressed")
        slots = totals(server, "tokens", "tp_rank", kind="freed")
        assert_no_leak(server.url)
        server.flush_cache()
        assert_no_leak(server.url)
    assert counted == {str(rank): len(prompts) for rank in range(TP_SIZE)}
    assert slots == {str(rank): freed(responses) for rank in range(TP_SIZE)}
    for prompt, method, response in zip(prompts, methods, responses, strict=True):
        found = info(response)
        assert found["status"] == "compressed"
        prefill = oracle.prefill(prompt, WINDOW)
        split = (found["shared_prefix_tokens"], found["kept_tokens"], WINDOW)
        keep = per_rank_keep(KEEP[method], prefill, TP_SIZE, *split)
        # Only these compare a layer's heads, or weigh its layers by their scores.
        compares_heads = method in ("lava", "adakv")
        assert torch.equal(keep, KEEP[method](prefill, *split)) is not compares_heads
        steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=response["output_ids"])
        assert_same_tokens(steps, response["output_ids"])
    prefill = oracle.prefill(prompts[3], WINDOW)
    steps = oracle.greedy(prefill, None, MAX_NEW_TOKENS, force=exact["output_ids"])
    assert_same_tokens(steps, exact["output_ids"])


def test_each_replica_compresses_and_counts_its_own_requests(
    start_server: StartServer, oracle: Oracle, tokens: list[int]
) -> None:
    (prompt,) = cut(tokens, [330], 42_000)
    with start_server(*OPTIONS, "--dp", str(DP_SIZE), env=environment(DP_SIZE)) as server:
        responses = [
            generate(server.url, prompt, MAX_NEW_TOKENS, {"budget": 0.25}, routed_dp_rank=rank)
            for rank in range(DP_SIZE)
        ]
        replicas = replica_stats(server.url)
        slots = totals(server, "tokens", "dp_rank", kind="freed")
        assert_no_leak(server.url)
        server.flush_cache()
        assert_no_leak(server.url)
    first, second = responses
    assert info(first) == info(second)
    assert first["output_ids"] == second["output_ids"]
    assert [found["requests"]["compressed"] for found in replicas] == [1, 1]
    assert [found["slots_freed"] for found in replicas] == [freed([first])] * DP_SIZE
    assert slots == {str(rank): freed([first]) for rank in range(DP_SIZE)}
    found = info(first)
    prefill = oracle.prefill(prompt, WINDOW)
    keep = KEEP["lava"](prefill, found["shared_prefix_tokens"], found["kept_tokens"], WINDOW)
    steps = oracle.greedy(prefill, keep, MAX_NEW_TOKENS, force=first["output_ids"])
    assert_same_tokens(steps, first["output_ids"])
