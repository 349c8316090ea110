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
