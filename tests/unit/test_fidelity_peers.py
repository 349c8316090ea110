# SPDX-License-Identifier: Apache-2.0
"""A run with kvpress's presses, on a kvpress of our own: what it is asked for, what is read."""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import divergence, needle
from benchmarks.fidelity.options import pairs_of
from benchmarks.fidelity.peers import PeerError, parse_peer, rows
from benchmarks.fidelity.teacher_forcing import continuation_logits
from lava_sglang.tools.inspection.prefill import load_model, prefill
from tests.unit.tiny_llama import KV_HEADS, LAYERS, random_tokens

PROMPT, FED = random_tokens(90, 3), random_tokens(6, 4)


@dataclass
class KnormPress:
    """Truncates to the entries of the smallest keys; `sign` -1 the largest."""

    compression_ratio: float = 0.0
    sign: int = 1

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def compress(module: Any, positional: Any, named: Any, output: Any) -> None:
            layer = named["past_key_values"].layers[module.layer_idx]
            scores = -self.sign * layer.keys.norm(dim=-1)
            kept = scores.topk(int(scores.shape[2] * (1 - self.compression_ratio)), dim=-1).indices
            at = kept[..., None].expand(-1, -1, -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)

        attentions = [layer.self_attn for layer in model.model.layers]
        hooks = [each.register_forward_hook(compress, with_kwargs=True) for each in attentions]
        yield
        for hook in hooks:
            hook.remove()


@dataclass
class SnapKVPress(KnormPress):
    window_size: int = 64


@dataclass
class MaskingPress:
    """Around another press; names entries to mask, as AdaKV does, which kvpress never frees."""

    press: Any
    masked: int = 3

    @property
    def compression_ratio(self) -> float:
        ratio: float = self.press.compression_ratio
        return ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        with self.press(model):
            yield
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = (torch.zeros(self.masked),) * 3


@pytest.fixture(autouse=True)
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kvpress")
    for press in (KnormPress, SnapKVPress, MaskingPress):
        setattr(module, press.__name__, press)
    monkeypatch.setitem(sys.modules, "kvpress", module)


def test_a_press_keeps_what_our_own_forcing_over_its_choice_sees(model_dir: Path) -> None:
    model = load_model(model_dir)
    exact = prefill(model, PROMPT, 1)
    pairs = [(parse_peer("kvpress:Knorm"), budget) for budget in (20, 0.5, 1.0)]
    found = list(rows(model, PROMPT, FED, pairs))
    assert [(row.budget, row.kept_tokens) for row in found] == [(20, 20), (0.5, 45), (1.0, 90)]
    norms: Tensor = exact.arena[:, 0].norm(dim=-1)  # [L, N, H]
    for row in found:
        columns = [
            (-norms[layer, :, head]).topk(int(row.kept_tokens)).indices.sort().values
            for layer in range(LAYERS)
            for head in range(KV_HEADS)
        ]
        expected = continuation_logits(model, exact, FED, [columns])[0]
        torch.testing.assert_close(row.logits, expected, atol=1e-4, rtol=1e-4)


def test_masked_entries_are_not_counted_as_kept(model_dir: Path) -> None:
    model = load_model(model_dir)
    peer = parse_peer("kvpress:Masking+Knorm:sign=-1,masked=6")
    (row,) = rows(model, PROMPT, FED, [(peer, 20)])
    assert row.kept_tokens == 20 - 6 / KV_HEADS
    assert inspect.signature(type(peer.press.press)).parameters.keys() >= {"sign"}
    assert (peer.press.press.sign, peer.press.masked) == (-1, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvpress:None", "kvpress has no NonePress"),
        ("kvpress:Knorm+SnapKV", "Knorm goes around no other press"),
        ("kvpress:SnapKV:speed=9", "speed=9: accepts sign, window_size"),
    ],
)
def test_a_bad_spec_is_named(spec: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        parse_peer(spec)


def test_without_kvpress_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(PeerError, match=r"needs kvpress .*pip install"):
        parse_peer("kvpress:SnapKV")


def test_a_budget_within_a_presss_own_window_is_left_out() -> None:
    peer = parse_peer("kvpress:Masking")
    assert pairs_of([peer], [32, 64, 65, 0.5]) == [(peer, 65), (peer, 0.5)]


def test_the_commands_measure_ours_and_theirs(model_dir: Path, tmp_path: Path) -> None:
    text = "".join(f"The clerk of number {number} wrote a letter. " for number in range(60))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book.txt").write_text(text)
    data = str(tmp_path / "data")
    common = ["--model-path", str(model_dir), "--data", data, "--device", "cpu"]
    common += ["--methods", "snapkv", "kvpress:Knorm", "--budgets", "40,0.5"]
    for command, more in (
        (divergence, ["--contexts", "1", "--lengths", "160", "--new-tokens", "20"]),
        (needle, ["--needles", "1", "--lengths", "300", "--kinds", "digits3"]),
    ):
        path = tmp_path / f"{command.__name__}.jsonl"
        command.main([*common, *more, "--results", str(path)])
        records = [json.loads(line) for line in path.read_text().splitlines()][1:]
        choices = {(r["method"], r["budget"]) for r in records}
        assert choices == {
            ("full", None),
            *((method, b) for method in ("snapkv", "kvpress:Knorm") for b in (40, 0.5)),
        }
        assert {r["kept_tokens"] for r in records if r["budget"] == 40} == {40}
