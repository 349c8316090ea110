# SPDX-License-Identifier: Apache-2.0
"""The simulator's invariants, with SGLang's admission and ours as they are installed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import simulate
from simulator.calibration import MeasuredRun, calibrate, config_of, fit, read_bench
from simulator.costs import CHIPS, MODELS, Chunk, FittedCosts, ModelShape, RooflineCosts
from simulator.memory import SlotPool, SlotTree
from simulator.outcome import Outcome
from simulator.simulation import ServerShape, Simulation
from simulator.trace import Arrival, Lengths, Synthetic, TraceError, read_trace

from lava_sglang.config import KVCompressionConfig
from lava_sglang.tools.demo.model import CONFIG as DEMO_MODEL

pytestmark = pytest.mark.usefixtures("runtime_context")

COSTS = FittedCosts(1e-4, 1e-2, 1e-4, 1e-7, 1e-6)
QUARTER = KVCompressionConfig(method="lava", budget=0.25)
SERVER = ServerShape(slots=20_000, chunked_prefill_size=1024)


class Checked(Simulation):
    """Counts every slot's owner whenever something changed."""

    def _prefill(self, admitted: Any) -> None:
        super()._prefill(admitted)
        self.check()

    def _decode(self, next_arrival: float) -> None:
        super()._decode(next_arrival)
        self.check()

    def check(self) -> None:
        live = [*self.running_batch.reqs, *([self.chunked_req] if self.chunked_req else [])]
        private = sum(req.held + req.tail_len for req in live)
        tree = self.tree_cache
        nodes = tree.nodes.values()
        assert tree.evictable == sum(node.length for node in nodes if node.locks == 0)
        assert tree.protected == sum(node.length for node in nodes if node.locks)
        assert self.pool.free + tree.evictable + tree.protected + private == self.pool.size
        assert self.pool.free >= 0 and tree.evictable >= 0
        lengths = [req.length for req in self.running_batch.reqs]
        assert self.slots_read == sum(lengths)
        assert self.outcome.peak_used_slots <= self.pool.size


def run(
    config: KVCompressionConfig | None = None,
    server: ServerShape = SERVER,
    requests: int = 60,
    rate: float = math.inf,
    **changes: Any,
) -> Outcome:
    values: dict[str, Any] = {
        "prompt": Lengths(3000, 0.4),
        "output": Lengths(100, 0.5),
    }
    trace = Synthetic(requests, rate, **values | changes)
    simulation = Checked(server, COSTS, config)
    outcome = simulation.run(trace)
    assert outcome.answered + outcome.refused == requests
    assert simulation.pool.free + simulation.tree_cache.evictable == server.slots
    assert simulation.tree_cache.protected == 0
    if not outcome.refused:
        assert outcome.output_tokens == sum(arrival.output_tokens for arrival in trace)
    return outcome


@pytest.mark.parametrize("config", [None, QUARTER], ids=["stock", "lava"])
@pytest.mark.parametrize("rate", [0.5, 5.0, math.inf])
@pytest.mark.parametrize("chunk", [256, 1024, None])
def test_every_request_is_answered_and_no_slot_is_lost(
    config: KVCompressionConfig | None, rate: float, chunk: int | None
) -> None:
    outcome = run(config, ServerShape(20_000, chunk), rate=rate)
    assert outcome.refused == 0
    assert outcome.compressed == (0 if config is None else 60 + outcome.retractions)
    busy = outcome.prefill_seconds + outcome.decode_seconds
    if rate == math.inf:
        assert outcome.seconds == pytest.approx(busy)
    assert outcome.seconds >= busy * (1 - 1e-9)


def test_a_budget_of_all_is_stock() -> None:
    stock, whole = run(), run(KVCompressionConfig(method="lava", budget=1.0))
    assert whole.as_json() == stock.as_json()
    assert whole.ttft == stock.ttft


def test_a_smaller_budget_lets_more_requests_decode() -> None:
    budgets = [1.0, 0.5, 0.25, 0.125]
    found = [run(KVCompressionConfig(method="lava", budget=budget)) for budget in budgets]
    running = [outcome.mean_running for outcome in found]
    assert running == sorted(running) and running[-1] > 2 * running[0]
    throughput = [outcome.output_throughput for outcome in found]
    assert throughput == sorted(throughput)


def test_concurrency_is_what_the_arithmetic_allows() -> None:
    """Prompts come and go; what stays is b slots and the answer of each."""
    same = {"prompt": Lengths(2000), "output": Lengths(500), "asked": 1.0}
    server = ServerShape(20_000, 2048, ignore_eos=True)
    stock, quarter = run(None, server, **same), run(QUARTER, server, **same)
    assert stock.peak_running == 20_000 // 2500
    allowed = 20_000 // (500 + 500)
    assert 0.9 * allowed <= quarter.peak_running <= allowed
    assert stock.retractions == quarter.retractions == 0


LADDER = KVCompressionConfig(method="lava", budget=(0.5, 0.25, 0.125))


def test_a_ladder_keeps_more_at_low_load_and_serves_as_many_at_high_load() -> None:
    last = KVCompressionConfig(method="lava", budget=0.125)
    low, high = run(LADDER, rate=0.1), run(LADDER, requests=150)
    assert low.trims == 0 and low.kept_share == pytest.approx(0.5, abs=0.01)
    assert high.kept_share < 0.2
    assert high.peak_running >= 0.9 * run(last, requests=150).peak_running
    assert high.retractions == 0


def test_a_burst_trims_what_runs_before_anything_is_retracted() -> None:
    early = [Arrival(i, 3000, 2000, 2000) for i in range(8)]
    burst = [Arrival(10.0, 3000, 50, 50) for _ in range(60)]
    simulation = Checked(ServerShape(20_000, 1024), COSTS, LADDER)
    outcome = simulation.run([*early, *burst])
    assert (outcome.answered, outcome.retractions) == (68, 0)
    assert outcome.trims > 0 and outcome.kept_share < 0.25


def test_on_pressure_nothing_is_compressed_before_slots_are_short() -> None:
    pressure = KVCompressionConfig(method="lava", budget=0.25, trigger="pressure")
    low, high = run(pressure, rate=0.1), run(pressure, requests=150)
    assert low.compressed == 0
    assert high.compressed > 0 and high.mean_running > 1.5 * run(requests=150).mean_running


def test_long_answers_are_compressed_again_and_their_slots_stay_bounded() -> None:
    long = {"output": Lengths(3000), "asked": 1.0, "requests": 20}
    plain = run(QUARTER, **long)
    again = run(QUARTER.model_copy(update={"decode_interval": 200}), **long)
    assert again.mean_running > 1.5 * plain.mean_running
    assert again.seconds < plain.seconds


def test_more_load_than_capacity_is_not_more_throughput() -> None:
    capacity = run(requests=200).request_throughput
    rates = [0.1 * capacity, 0.5 * capacity, 2 * capacity, 8 * capacity]
    found = [run(requests=200, rate=rate) for rate in rates]
    throughput = [outcome.request_throughput for outcome in found]
    assert all(t <= 1.05 * capacity for t in throughput)
    assert throughput[0] == pytest.approx(rates[0], rel=0.2)
    waits = [sorted(outcome.ttft)[100] for outcome in found]
    assert waits == sorted(waits) and waits[-1] > 10 * waits[0]


@pytest.mark.parametrize("config", [None, QUARTER], ids=["stock", "lava"])
def test_answers_longer_than_admission_hoped_for_are_retracted_and_finished(
    config: KVCompressionConfig | None,
) -> None:
    long = {"output": Lengths(1500), "asked": 1.0, "prompt": Lengths(1000)}
    outcome = run(config, ServerShape(12_000, 1024), **long)
    assert outcome.retractions > 0 and outcome.refused == 0


def test_a_shared_start_is_computed_once() -> None:
    shared = {"groups": 2, "shared_tokens": 2000, "prompt": Lengths(2600), "rate": 0.5}
    alone, together = run(rate=0.5, prompt=Lengths(2600)), run(**shared)
    assert alone.prefill_tokens == 60 * 2600
    assert together.prefill_tokens == pytest.approx(60 * 600 + 2 * 2000, rel=0.1)
    small = run(QUARTER, **shared)
    assert small.prefill_tokens == together.prefill_tokens and small.compressed >= 58


def test_what_the_pool_cannot_hold_is_refused_and_what_it_asks_for_is_cut() -> None:
    server = ServerShape(2000, 1024)
    trace = [Arrival(0, 1994, 5, 5), Arrival(0, 1993, 50, 50), Arrival(0, 100, 5, 9_999)]
    outcome = Checked(server, COSTS, None).run(trace)
    assert (outcome.refused, outcome.answered) == (1, 2)
    assert outcome.output_tokens == 5 + (2000 - 1 - 1993 - 1)


def test_an_idle_server_waits_for_arrivals() -> None:
    outcome = Simulation(SERVER, COSTS, None).run([Arrival(5, 100, 2, 2), Arrival(50, 100, 2, 2)])
    assert outcome.seconds == pytest.approx(50 + 100 * 1e-4 + 1e-2, abs=1e-3)
    assert max(outcome.ttft) == pytest.approx(100 * 1e-4)


def test_the_pool_evicts_the_oldest_leaf_and_never_what_is_locked() -> None:
    tree = SlotTree()
    pool = SlotPool(100, tree)
    for rid in (1, 2):
        pool.take(30)
        tree.insert("g", 10, rid, 30)
        pool.give_back(30 - (30 if rid == 1 else 20))
    assert (pool.free, tree.evictable) == (50, 50)
    lock = tree.lock(tree.match("g", 2))
    assert (tree.evictable, tree.protected) == (20, 30)
    assert not pool.take(71) and pool.take(60)
    assert tree.match("g", 1).depth == 10 and tree.match("g", 2).depth == 30
    tree.unlock(lock)
    assert pool.take(40) and tree.evictable == 0 and tree.match("g", 2) is tree.root


def test_a_traces_lines_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"seconds": 1.0, "prompt_tokens": 10, "output_tokens": 3}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "max_new_tokens": 8}) + "\n")
    assert list(read_trace(path)) == [Arrival(1.0, 10, 3, 3), Arrival(1.0, 10, 3, 8)]
    for change, message in [
        ({"prompt_tokens": 0}, "line 1: prompt_tokens=0: accepts a whole number from 1 up"),
        ({"max_new_tokens": 2}, "line 1: max_new_tokens=2: accepts a whole number from 3 up"),
        ({"shared_tokens": 10}, "line 1: shared_tokens=10: accepts a whole number from 0 to 9"),
        ({"color": 1}, "line 1: .*unexpected keyword argument 'color'"),
    ]:
        path.write_text(json.dumps({**line, **change}))
        with pytest.raises(TraceError, match=message):
            list(read_trace(path))
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "seconds": 0.5}))
    with pytest.raises(TraceError, match=r"line 2: seconds=0.5: accepts numbers from 1.0 up"):
        list(read_trace(path))


def test_lengths_and_arrivals_have_the_asked_means() -> None:
    trace = list(Synthetic(20_000, 4.0, Lengths(1000, 0.5), Lengths(100), seed=3))
    assert sum(a.prompt_tokens for a in trace) / 20_000 == pytest.approx(1000, rel=0.02)
    assert {a.output_tokens for a in trace} == {100}
    assert trace[-1].seconds == pytest.approx(5000, rel=0.02)


def test_costs_of_a_gpu(tmp_path: Path) -> None:
    costs = RooflineCosts(MODELS["llama-3-8b"], CHIPS["h100"])
    assert costs.model.weight_bytes == pytest.approx(16.06e9, rel=0.01)
    assert costs.model.slot_bytes == 131_072
    assert costs.pool_slots(0.85) == pytest.approx(396_000, rel=0.01)
    # Weights are read once a step, K and V for each request; a prefill is arithmetic.
    assert costs.decode(1, 0) == pytest.approx(1e-3 + 15.0e9 / (3.35e12 * 0.7), rel=0.02)
    per_slot = (costs.decode(8, 64_000) - costs.decode(8, 32_000)) / 32_000
    assert per_slot == pytest.approx(131_072 / (3.35e12 * 0.7))
    assert costs.prefill([Chunk(0, 8000)]) == pytest.approx(0.28, rel=0.1)
    split = costs.prefill([Chunk(0, 4000)]) + costs.prefill([Chunk(4000, 4000)])
    assert split == pytest.approx(costs.prefill([Chunk(0, 8000)]) + 1e-3)
    assert 0 < costs.compress(8000, 1000) < 0.02 * costs.prefill([Chunk(0, 8000)])
    (tmp_path / "config.json").write_text(json.dumps(DEMO_MODEL))
    demo = ModelShape.read(tmp_path / "config.json")
    assert demo.parameters == pytest.approx(134.5e6, rel=0.01)


def measured(target: str, length: int, requests: int, suffix: int, kept: int) -> MeasuredRun:
    """What a server with COSTS would have counted, had 10 steps had two sizes of batch."""
    lengths = [length + 8] * requests
    n, sizes = 10, (requests, requests // 2)
    mean = length + 8 - (suffix - kept) / requests
    times = [1e-2 + 1e-4 * b + 1e-7 * b * mean for b in sizes]
    moments = [
        2 * n, n * sum(sizes), n * sum(times), n * sum(b * b for b in sizes),
        n * sum(b * t for b, t in zip(sizes, times, strict=True)),
    ]  # fmt: skip
    compression = {"suffix_tokens": suffix, "kept_tokens": kept} if suffix else None
    request = {"start": 0.0, "prompt_tokens": length, "output_tokens": 16}
    return MeasuredRun(
        {
            "target": target,
            "requests": [request] * requests,
            "prompt_tokens": length * requests,
            "output_tokens": 16 * requests,
            "pool_slots": 20_000,
            "counters": {
                "prefill_seconds": 1e-4 * length * requests + 1e-6 * suffix,
                "prefill_tokens": length * requests,
                "decode_moments": moments,
                "retractions": 0,
                "compression": compression,
            },
            "latencies": {"ttft_p50": 1000.0},
            "seconds": 10.0, "output_throughput": 16.0, "prefill_share": 0.5,
            "peak_decoding": requests, "mean_decoding": float(requests),
            "lengths": lengths,
        }
    )  # fmt: skip


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    runs = [measured("off", 4000, 4, 0, 0), measured("lava@0.25", 4000, 8, 32_000, 8_000)]
    assert vars(fit(runs)) == pytest.approx(vars(COSTS), rel=1e-6)


def test_a_machine_that_others_slowed_down_is_brought_to_one_speed() -> None:
    runs = [measured("off", 4000, 4, 0, 0), measured("off", 4000, 8, 0, 0)]
    runs[1].values["counters"]["prefill_seconds"] *= 3
    count, b, t, bb, bt = runs[1].moments
    runs[1].values["counters"]["decode_moments"] = [count, b, 3 * t, bb, 3 * bt]
    alone, both = fit(runs[:1]), fit(runs, [1.0, 3.0])
    assert both.prefill_token == pytest.approx(alone.prefill_token)
    assert both.decode(8, 32_064) == pytest.approx(alone.decode(8, 32_064), rel=0.05)
    assert both.slower(2).prefill([Chunk(0, 10)]) == 2 * both.prefill([Chunk(0, 10)])
    settings = {"chunked_prefill_size": 1024, "method": "lava", "min_tokens": None}
    (found,) = calibrate(settings, runs, ["off"], shared_machine=True)
    (as_it_is,) = calibrate(settings, runs, ["off"])
    assert found.predicted["seconds"] != as_it_is.predicted["seconds"]


def test_costs_of_one_length_are_its_slots() -> None:
    found = fit([measured("off", 4000, 4, 0, 0)])
    assert found.decode_request == 0.0 and found.compress_token == 0.0
    assert found.decode(4, 4 * 4008) == pytest.approx(COSTS.decode(4, 4 * 4008), rel=1e-6)


def test_a_calibration_predicts_and_says_its_error() -> None:
    runs = [
        measured("stock", 2000, 4, 0, 0),
        measured("off", 2000, 4, 0, 0),
        measured("lava@0.25", 2000, 4, 8000, 2000),
    ]
    settings = {"chunked_prefill_size": 1024, "method": "lava", "min_tokens": None}
    stock, off, quarter = calibrate(settings, runs, ["stock", "off"])
    assert [stock.fitted, off.fitted, quarter.fitted] == [True, True, False]
    assert stock.predicted == off.predicted
    assert quarter.predicted["seconds"] < 10
    assert quarter.error("seconds") == quarter.predicted["seconds"] / 10.0 - 1
    assert quarter.error("retractions") is None
    with pytest.raises(TraceError, match=r"--fit fast: accepts any of stock, off, lava@0.25"):
        calibrate(settings, runs, ["fast"])
    with pytest.raises(TraceError, match=r"--fit stock: accepts at least one of off, lava@0.25"):
        calibrate(settings, runs, ["stock"])


def test_the_settings_of_a_target() -> None:
    assert config_of("off", "lava", None) is None
    found = config_of("snapkv@0.125:scope=prompt", "lava", 64)
    assert found is not None
    assert (found.method, found.budget, found.scope, found.min_tokens) == (
        "snapkv", (0.125,), "prompt", 64,
    )  # fmt: skip
    ladder = config_of("lava@0.5,0.25:trigger=pressure", "lava", None)
    assert ladder is not None and (ladder.budget, ladder.trigger) == ((0.5, 0.25), "pressure")


def test_only_independent_requests_are_simulated(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"settings": {"workload": "chat"}, "runs": []}))
    with pytest.raises(TraceError, match="workload=chat: accepts unshared or long-answers"):
        read_bench(path)
    path.write_text("[]")
    with pytest.raises(TraceError, match=r"not a file of bench_serving\.py"):
        read_bench(path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(simulate, "publish_settings", lambda: None)
    return simulate.main


def test_the_command_compares_budgets(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = "--requests 20 --prompt-tokens 2000 4000 --slots 30000 --budgets 1 0.25"
    command([*options.split(), "--json", str(out), "--plot", str(picture)])
    report = json.loads(out.read_text())
    assert [(p["prompt_tokens"], p["budget"]) for p in report["points"]] == [
        (2000, "1"), (2000, "0.25"), (4000, "1"), (4000, "0.25"),
    ]  # fmt: skip
    assert all(point["answered"] == 20 for point in report["points"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "A model, not a measurement" in capsys.readouterr().out


def test_the_command_reads_a_trace_and_rates(command: Any, tmp_path: Path) -> None:
    trace, out, picture = tmp_path / "trace.jsonl", tmp_path / "out.json", tmp_path / "out.png"
    line = {"seconds": 0.0, "prompt_tokens": 1000, "output_tokens": 10}
    trace.write_text(json.dumps(line) + "\n")
    command(["--trace", str(trace), "--slots", "5000", "--budgets", "1", "--json", str(out)])
    assert json.loads(out.read_text())["points"][0]["answered"] == 1
    options = "--requests 20 --prompt-tokens 2000 --slots 30000 --budgets 1 0.25 --rate 1 4"
    command([*options.split(), "--json", str(out), "--plot", str(picture)])
    assert [point["rate"] for point in json.loads(out.read_text())["points"]] == [1, 1, 4, 4]
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "0"], "--budgets: budget=0: accepts a fraction"),
        (["--budgets", "0.5,half"], "--budgets: budget='0.5,half': accepts a fraction"),
        (["--rate", "0"], "--rate 0: accepts numbers above 0"),
        (["--model", "llama-3-70b"], "--chip h100: the 141 GB of Llama-3-70B leave no room"),
        (["--calibrate", "absent.json"], "--calibrate absent.json: not a file of bench_serving.py"),
    ],
)
def test_a_bad_option_ends_the_command_with_a_sentence(
    command: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(["--requests", "2", *options])
    assert message in capsys.readouterr().err
