# SPDX-License-Identifier: Apache-2.0
"""Presses as methods of a run, with a kvpress of our own: what they get, keep and refuse."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import divergence
import needle
import peers_check
import pytest
import torch
from continuation import mean_kept
from options import pairs_of
from peers import (
    PeerError,
    attention_weights,
    compress,
    copied_rows,
    parse_peers,
    recorded,
    removed_share,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from lava_sglang.tools.inspection.prefill import ATTENTION, load_model, prefill
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS, random_tokens

PROMPT = random_tokens(90, 3)


@dataclass
class KnormPress:
    """Truncates to the entries of the smallest keys; `sign` -1 the largest."""

    compression_ratio: float = 0.0
    sign: int = 1

    def score(self, module: Any, hidden: Any, keys: Tensor, *_: Any) -> Tensor:
        return -self.sign * keys.norm(dim=-1)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """What a prefill within leaves in the cache of transformers is compressed."""

        def compress(module: Any, positional: Any, named: Any, output: Any) -> None:
            layer = named["past_key_values"].layers[module.layer_idx]
            arguments = (module, named["hidden_states"], layer.keys, layer.values, None, named)
            layer.keys, layer.values = self.compress(*arguments)

        attentions = [layer.self_attn for layer in model.model.layers]
        hooks = [each.register_forward_hook(compress, with_kwargs=True) for each in attentions]
        yield
        for hook in hooks:
            hook.remove()

    def compress(
        self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self.score(module, hidden, keys, values, attentions, kwargs)
        kept = scores.topk(int(keys.shape[2] * (1 - self.compression_ratio)), dim=-1).indices
        rows = kept[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, rows), values.gather(2, rows)


@dataclass
class ObservedAttentionPress(KnormPress):
    def score(self, module: Any, hidden: Any, keys: Any, values: Any, *more: Any) -> Tensor:
        attentions: Tensor = more[0]
        return attentions.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)


@dataclass
class SnapKVPress(KnormPress):
    window_size: int = 64


@dataclass
class StreamingLLMPress(KnormPress):
    def score(self, module: Any, hidden: Any, keys: Tensor, *_: Any) -> Tensor:
        return torch.arange(keys.shape[2]).expand(keys.shape[:3]) * 1.0


@dataclass
class RandomPress(KnormPress):
    def score(self, module: Any, hidden: Any, keys: Tensor, *_: Any) -> Tensor:
        return torch.rand(keys.shape[:3])


@dataclass
class AdaKVPress:
    """Keeps all entries and names what to mask, over all heads together."""

    press: KnormPress
    alpha_safeguard: float = 0.2

    @property
    def compression_ratio(self) -> float:
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def compress(
        self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self.press.score(module, hidden, keys, values, attentions, kwargs)[0]
        length = keys.shape[2]
        dropped = length - int(length * (1 - self.compression_ratio))
        masked = (-scores).flatten().topk(dropped * len(scores)).indices
        module.masked_key_indices = (torch.zeros_like(masked), masked // length, masked % length)
        return keys, values


@dataclass
class KVzipPress:
    """Prefills by itself, and keeps the first tokens more the deeper the layer."""

    compression_ratio: float = 0.0

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        lengths: list[int] = []
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb  # kvpress leaves it there
        layer = model.model.layers[0].self_attn
        hook = layer.register_forward_pre_hook(
            lambda module, positional, named: lengths.append(named["hidden_states"].shape[1]),
            with_kwargs=True,
        )
        yield
        hook.remove()
        (self.length,) = lengths
        self.compress_post(model)

    def compress_post(self, model: Any) -> None:
        dropped = int(LAYERS * KV_HEADS * self.length * self.compression_ratio) // KV_HEADS
        for layer, more in zip(model.model.layers, (5, 0, -5), strict=True):
            tokens = torch.arange(self.length - dropped // LAYERS - more, self.length)
            heads = torch.arange(KV_HEADS).repeat_interleave(len(tokens))
            batch = torch.zeros_like(heads)
            layer.self_attn.masked_key_indices = (batch, heads, tokens.repeat(KV_HEADS))


@pytest.fixture(autouse=True)
def kvpress(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("kvpress")
    presses = (KnormPress, SnapKVPress, StreamingLLMPress, ObservedAttentionPress, RandomPress)
    for press in (*presses, AdaKVPress, KVzipPress):
        setattr(module, press.__name__, press)
    monkeypatch.setitem(sys.modules, "kvpress", module)
    return module


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir)


def chosen(model: Any, spec: str, budgets: Sequence[int], drop_last: int = 0) -> Any:
    (peer,) = parse_peers(spec)
    with recorded(model, [peer]) as inputs:
        exact = prefill(model, PROMPT, drop_last + 1, chunk_tokens=32)
    return peer.choose(exact.without_last(drop_last) if drop_last else exact, inputs, budgets)


@pytest.mark.parametrize("rounding", [math.floor, round])
def test_a_ratio_keeps_the_budget(rounding: Any) -> None:
    for length in (90, 1000, 1024, 6144, 131072):
        for kept in (1, 33, 64, length // 4, length - 1):
            assert rounding(length * (1 - removed_share(kept, length))) == kept


def test_a_press_keeps_its_entries(model: Any) -> None:
    few, many, everything = chosen(model, "kvpress:Knorm", [20, 45, 90])
    assert everything is None
    assert [len(column) for column in few] == [20] * (LAYERS * KV_HEADS)
    arena = prefill(model, PROMPT, 1, chunk_tokens=32).arena
    for number, (column, wider) in enumerate(zip(few, many, strict=True)):
        norms = arena[number // KV_HEADS, 0, :, number % KV_HEADS].norm(dim=1)
        assert column.tolist() == norms.topk(20, largest=False).indices.sort().values.tolist()
        assert set(column.tolist()) < set(wider.tolist())


def test_a_prompt_without_its_last_tokens(model: Any) -> None:
    """The later question's own states are not shown to the press."""
    (columns,) = chosen(model, "kvpress:StreamingLLM", [10], drop_last=25)
    assert all(column.tolist() == list(range(55, 65)) for column in columns)


def test_masked_heads_are_ragged_and_sum_to_the_budget(model: Any) -> None:
    (columns,) = chosen(model, "kvpress:AdaKV+Knorm", [20])
    counts = torch.tensor([len(column) for column in columns]).view(LAYERS, KV_HEADS)
    assert counts.sum(dim=1).tolist() == [20 * KV_HEADS] * LAYERS
    assert (counts != 20).any()
    assert mean_kept(columns, len(PROMPT)) == 20
    assert mean_kept([*columns[1:], columns[0][:-1]], 90) == round(20 - 1 / (LAYERS * KV_HEADS), 4)
    assert mean_kept(None, 90) == 90


def test_a_press_that_prefills_by_itself(model: Any) -> None:
    """It has the stock model for as long as it runs; its budget is over all layers."""
    few, many, everything = chosen(model, "kvpress:KVzip", [20, 45, 65], drop_last=25)
    assert everything is None
    for columns, budget in ((few, 20), (many, 45)):
        assert mean_kept(columns, 65) == budget
        expected = [budget - 5] * KV_HEADS + [budget] * KV_HEADS + [budget + 5] * KV_HEADS
        assert [column.tolist() for column in columns] == [list(range(n)) for n in expected]
    assert model.config._attn_implementation == ATTENTION
    assert chosen(model, "kvpress:Knorm", [20])[0] is not None


@pytest.mark.parametrize("spec", ["kvpress:AdaKV+Knorm", "kvpress:KVzip"])
def test_a_press_leaves_the_model_as_it_was(model: Any, spec: str) -> None:
    before = [name for name, _ in model.named_modules()]
    assert chosen(model, spec, [20])[0] is not None
    assert [name for name, _ in model.named_modules()] == before


def test_a_press_finds_the_rotary_embedding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def score(self: Any, module: Any, *_: Any) -> Tensor:
        seen.append(module.rotary_emb)
        raise RuntimeError("stop")

    monkeypatch.setattr(KnormPress, "score", score)
    with pytest.raises(RuntimeError, match="stop"):
        chosen(model, "kvpress:Knorm", [20])
    assert seen == [model.model.rotary_emb]
    assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in model.model.layers)


def test_attention_is_that_of_transformers(model: Any, model_dir: Path) -> None:
    stock = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = stock(torch.tensor([PROMPT]), output_attentions=True).attentions
    (peer,) = parse_peers("kvpress:ObservedAttention")
    with recorded(model, [peer]) as inputs:
        exact = prefill(model, PROMPT, 1, chunk_tokens=32)
    with torch.no_grad():
        found = [attention_weights(layer) for layer in inputs.layers(exact)]
    assert found[0].shape == (1, QUERY_HEADS, len(PROMPT), len(PROMPT))
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-4)
    assert chosen(model, "kvpress:ObservedAttention", [20])[0] is not None


def test_settings_go_to_the_press_that_has_them() -> None:
    (peer,) = parse_peers("kvpress:AdaKV+Knorm:sign=-1,alpha_safeguard=0.5")
    press = peer.new_press()
    assert (press.alpha_safeguard, press.press.sign) == (0.5, -1)
    assert (peer.label, peer.kept_tokens(0.25, 1000)) == (peer.label, 250)
    with pytest.raises(PeerError, match=r"window=3: accepts alpha_safeguard, sign"):
        parse_peers("kvpress:AdaKV+Knorm:window=3")


@pytest.mark.parametrize("spec", ["kvpress:Magic", "kvpress:Knorm+AdaKV", "kvpress:AdaKV+Magic"])
def test_an_unknown_press_is_named(spec: str) -> None:
    with pytest.raises(PeerError, match=r"accepts kvpress:PRESS, of SnapKV, .*AdaKV, CriticalKV"):
        parse_peers(spec)


def test_without_kvpress_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerError, match="this kvpress has no KeyDiffPress"):
        parse_peers("kvpress:KeyDiff")
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(PeerError, match=r"needs kvpress .*pip install .*kvpress==\d"):
        parse_peers("kvpress")


def test_a_budget_exceeds_the_window_of_the_press_not_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    specs = ["kvpress:Knorm", "kvpress:SnapKV", "kvpress:SnapKV:window_size=32", "kvpress:AdaKV"]
    peers = [peer for spec in specs for peer in parse_peers(spec, {"window_size": 100})]
    pairs = pairs_of(peers, [32, 64, 65, 0.25])
    found = [(peer.label, budget, peer.kept_tokens(budget, 1000)) for peer, budget in pairs]
    assert found == [
        *((specs[0], budget, kept) for budget, kept in ((32, 32), (64, 64), (65, 65), (0.25, 250))),
        *((specs[1], budget, kept) for budget, kept in ((65, 65), (0.25, 250))),
        *((specs[2], budget, kept) for budget, kept in ((64, 64), (65, 65), (0.25, 250))),
        *((specs[3], budget, kept) for budget, kept in ((65, 65), (0.25, 250))),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "Left out: kvpress:SnapKV: --budgets 32,64: must exceed its window 64",
        "Left out: kvpress:SnapKV:window_size=32: --budgets 32: must exceed its window 32",
        "Left out: kvpress:AdaKV: --budgets 32,64: must exceed its window 64",
    ]


def test_changed_entries_are_refused(model: Any) -> None:
    class Merging(KnormPress):
        def compress(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().compress(*arguments)
            return keys, values + 1

    (peer,) = parse_peers("kvpress:Knorm")
    with recorded(model, [peer]) as inputs:
        exact = prefill(model, PROMPT, 1)
    layer = next(inputs.layers(exact))
    with pytest.raises(PeerError, match="Merging: changes entries"):
        compress(Merging(removed_share(20, 90)), layer, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_rows(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    at = torch.stack([torch.arange(40).flip(0)[:7], torch.arange(3, 10)])
    kept = rows.gather(1, at[:, :, None].expand(-1, -1, 8))
    assert torch.equal(copied_rows(kept, rows), at)
    assert copied_rows(kept + 1, rows) is None
    assert copied_rows(kept, rows, at.flip(1)) is None
    assert copied_rows(kept[:, [0, 0]], rows) is None, "the same row twice"


def test_peers_and_ours_in_one_file(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = "".join(f"The clerk of number {n} wrote a letter, nobody read it. " for n in range(40))
    (tmp_path / "data" / "book.txt").write_text(text)
    run = [
        *("--model-path", str(model_dir), "--data", str(tmp_path / "data"), "--device", "cpu"),
        *("--config", '{"window_size": 16}', "--budgets", "24,0.25,1.0"),
        *("--methods", "streamingllm:sink_tokens=0", "kvpress:StreamingLLM", "kvpress:AdaKV+Knorm"),
    ]
    files = [tmp_path / name for name in ("divergence.jsonl", "needle.jsonl")]
    reference = ["--reference", "streamingllm:sink_tokens=0", "--contexts", "1", "--lengths", "160"]
    divergence.main([*run, *reference, "--new-tokens", "20", "--results", str(files[0])])
    needles = ["--needles", "1", "--lengths", "300", "--kinds", "digits3"]
    needle.main([*run, *needles, "--results", str(files[1])])
    for path in files:
        records = [json.loads(line) for line in path.read_text().splitlines()][1:]
        ours, theirs, ada = (
            {(r.get("question"), r["budget"]): r for r in records if r["method"] == method}
            for method in run[-3:]
        )
        assert len(ours) == len(theirs) == len(ada) == (3 if path == files[0] else 6)
        field = "kl" if path == files[0] else "nll"
        for key, record in ours.items():
            # With no sinks theirs is ours: the newest entries.
            assert theirs[key][field] == pytest.approx(record[field], abs=1e-5)
            assert theirs[key]["kept_tokens"] == record["kept_tokens"] == ada[key]["kept_tokens"]


@pytest.fixture
def check(model_dir: Path, tmp_path: Path) -> list[str]:
    """Options of `peers_check`."""
    text = "".join(f"The clerk of number {n} wrote a letter, nobody read it. " for n in range(20))
    (tmp_path / "book.txt").write_text(text)
    return [
        *("--model-path", str(model_dir), "--data", str(tmp_path), "--device", "cpu"),
        *("--contexts", "1", "--lengths", "150", "--budget", "40", "--new-tokens", "6"),
    ]


def test_the_check_passes_where_kvpress_says_the_same(
    check: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["kvpress:Knorm", "kvpress:Random"]
    peers_check.main([*check, "--methods", *methods])
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    kl = {cells[0]: float(cells[3]) for cells in lines if cells and cells[0] in methods}
    assert list(kl) == methods
    # Random differs, and may: it draws.
    assert [value > peers_check.SAME_KL for value in kl.values()] == [False, True]


def test_the_check_fails_where_kvpress_keeps_others(
    check: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_check, "removed_share", lambda kept, n: removed_share(kept - 9, n))
    with pytest.raises(SystemExit) as stop:
        peers_check.main([*check, "--methods", "kvpress:Knorm", "kvpress:Random"])
    assert str(stop.value.code).startswith("KL(kvpress || ours) above 1e-06: kvpress:Knorm at 150")
    assert "Random" not in str(stop.value.code)


def test_a_server_is_not_asked_for_a_peer(model_dir: Path) -> None:
    run = ["--model-path", str(model_dir), "--server", "http://127.0.0.1:1"]
    with pytest.raises(
        ValueError, match=r"--methods kvpress:Knorm: accepts lava, .* with --server"
    ):
        needle.main([*run, "--methods", "kvpress:Knorm"])
