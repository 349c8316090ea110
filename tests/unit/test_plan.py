# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `lava-sglang plan`, beside what an H100 measured."""

import json
from pathlib import Path

import pytest

from lava_sglang.tools import cli
from lava_sglang.tools.plan import CHIPS, MODELS, ModelShape, PlanError, RooflineCosts, forecast

MEASURED = json.loads(Path(__file__).parents[2].joinpath("docs/h100_serving.json").read_text())
COSTS = RooflineCosts(MODELS["llama-3-8b"], CHIPS["h100"])


def test_a_models_size_is_its_published_one() -> None:
    assert MODELS["llama-3-8b"].weight_bytes == pytest.approx(2 * 8.03e9, rel=0.005)
    assert MODELS["llama-3-8b"].slot_bytes == 131_072


def test_a_config_is_read_as_hugging_face_writes_it(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelShape.read(tmp_path / "config.json")
    assert (model.layers, model.kv_heads, model.head_dim) == (30, 3, 64)


def test_sliding_layers_are_read_from_a_config(tmp_path: Path) -> None:
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    text = {
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "layer_types": types,
        "sliding_window": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    model = ModelShape.read(tmp_path / "config.json")
    assert (model.layers, model.sliding, model.sliding_window) == (18, 15, 512)
    # A step of 4,000 exact tokens reads all of 3 layers and a window of the 15 others.
    assert model.entries_read(4000, 4000, 10) == 3 * 4010 + 15 * 512
    # 1,200 slots hold more than full layers have; 500 what sliding ones read, and a rest.
    assert model.entries_read(4000, 1200, 10) == 3 * 4010 + 15 * 512
    assert model.entries_read(4000, 500, 10) == 18 * 500 - 15 * 511 + 3 * 10 + 15 * 512


def test_sliding_layers_give_up_their_slots_first() -> None:
    """A quarter of the slots would hold more than everything that is read: nothing is lost."""
    costs = RooflineCosts(MODELS["gemma-3-27b"], CHIPS["h200"])
    found = [forecast(costs, 100_000, 32_000, 512, budget) for budget in (1, 0.5, 0.25, 0.125)]
    lossless = -(-(52 * 1023 + 10 * 32_000) // 62)
    assert [each.kept_tokens for each in found] == [32_000, lossless, lossless, 4000]
    assert found[1].at_once >= 5 * found[0].at_once


@pytest.mark.parametrize(
    ("target", "budget"), [("off", 1), ("lava@0.25", 0.25), ("lava@0.125", 0.125)]
)
def test_it_says_how_many_decode_at_once_and_the_throughput_to_a_fifth(
    target: str, budget: float
) -> None:
    """40 requests of 4,000 prompt and 512 output tokens in 40,960 slots, as docs/h100.md says."""
    (run,) = (run for run in MEASURED["runs"] if run["target"] == target)
    found = forecast(COSTS, run["pool_slots"], 4000, 512, budget)
    assert found.at_once == run["peak_decoding"]
    assert found.output_throughput == pytest.approx(run["output_throughput"], rel=0.2)


def test_a_smaller_budget_frees_slots_and_leaves_the_prefill() -> None:
    exact, half, eighth = (forecast(COSTS, 100_000, 8000, 512, b) for b in (1, 0.5, 0.125))
    assert (exact.kept_tokens, half.kept_tokens, eighth.kept_tokens) == (8000, 4000, 1000)
    assert exact.at_once < half.at_once < eighth.at_once
    assert exact.prefill_share < half.prefill_share < eighth.prefill_share < 1


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlanError, match="--prompt-tokens=900 and --output-tokens=200: accepts up"):
        forecast(COSTS, 1000, 900, 200, 0.5)
    assert cli.main(["plan", "--model", "llama-3-70b"]) == 1
    assert "leave no room for slots" in capsys.readouterr().err
    assert cli.main(["plan", "--budgets", "3"]) == 1
    assert "--budgets=3: accepts a fraction" in capsys.readouterr().err
    assert cli.main(["plan", "--prompt-tokens", "4000", "--budgets", "0.25"]) == 0
    assert "off" in capsys.readouterr().out
