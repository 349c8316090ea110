# SPDX-License-Identifier: Apache-2.0
"""`ForcedTokens` in SGLang's own sampler, on real requests: batches, chunks, log-probabilities."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler, apply_custom_logit_processor
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.managers.request import LavaReq
from lava_sglang.tools.forced_tokens import SHIFT, ForcedTokens

pytestmark = pytest.mark.usefixtures("runtime_context")

VOCABULARY = 300
PROMPT_LEN = 40
COLUMNS = [7, 8, 9]
CONFIG = KVCompressionConfig(method="lava", min_tokens=16)


@dataclass
class Batch:
    """What `SamplingBatchInfo` reads of a ScheduleBatch."""

    reqs: list[LavaReq]
    device: str = "cpu"


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    """Of a server with `--enable-custom-logit-processor` on one rank."""
    with (
        get_exec().features.override(enable_custom_logit_processor=True),
        get_parallel().override(tp_group=SimpleNamespace(device_group=None)),
    ):
        yield Sampler()


def request(rid: str, forced: list[int] | None, watched: list[int] | None = None) -> LavaReq:
    """As the scheduler builds one whose whole prompt is in its next pass."""
    params: dict[str, Any] = {"kv_compression": {"budget": 0.5}}
    if forced is not None:
        params |= {
            "forced_tokens": forced,
            "watched_tokens": watched,
            "watched_columns": COLUMNS,
        }
    sampling = SamplingParams(temperature=0, max_new_tokens=8, custom_params=params)
    sampling.normalize(None)
    req = LavaReq(
        rid,
        "",
        array("q", range(PROMPT_LEN)),
        sampling,
        custom_logit_processor=None if forced is None else ForcedTokens.to_str(),
        config=CONFIG,
        layers=LayerMap.plain(1),
        page_size=1,
        vocab_size=VOCABULARY,
    )
    req.refresh_fill_ids()
    req.extend_end = PROMPT_LEN
    return req


def info_of(batch: Batch) -> SamplingBatchInfo:
    return SamplingBatchInfo.from_schedule_batch(batch, VOCABULARY)


def logits(seed: int, rows: int) -> torch.Tensor:
    return 4 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def sample(
    sampler: Sampler, info: SamplingBatchInfo, rows: torch.Tensor
) -> tuple[list[int], list[list[float]]]:
    """The tokens, and what SGLang returns as the log-probabilities of COLUMNS."""
    count = len(rows)
    output = LogitsProcessorOutput(next_token_logits=rows.clone())
    positions = torch.full((count,), PROMPT_LEN)
    tokens = sampler(output, info, True, [0] * count, [COLUMNS] * count, positions)
    told = output.next_token_token_ids_logprobs_val
    return tokens.tolist(), [row.tolist() for row in told]


def assert_told(told: list[float], row: torch.Tensor, watched: list[int]) -> None:
    true = row.log_softmax(0)
    expected = [*true[watched].tolist(), float(true.max())]
    assert [value + SHIFT for value in told] == pytest.approx(expected, abs=2e-5)


def test_sglang_reads_the_processor_from_its_text() -> None:
    assert type(CustomLogitProcessor.from_str(ForcedTokens.to_str())) is ForcedTokens


def test_requests_of_one_batch_in_sglangs_sampler(sampler: Sampler) -> None:
    """Two forced ones, one of which is half prefilled, with one of no processor between them."""
    first = request("first", [5, 0], [11, 12, 13, 14])
    plain = request("plain", None)
    second = request("second", [250, 6], [21, 22, 23, 24])
    second.extend_end = PROMPT_LEN - 1
    running = Batch([first, plain])
    info = info_of(running)
    chunk = Batch([second])
    prefilled = info_of(chunk)
    assert info.is_all_greedy and len(info.custom_logit_processor) == 1

    rows = logits(0, 3)
    tokens, told = sample(sampler, info, rows[:2])
    assert tokens == [5, int(rows[1].argmax())]
    assert_told(told[0], rows[0], [11, 12])
    assert told[1] == pytest.approx(rows[1].log_softmax(0)[COLUMNS].tolist())
    tokens, _ = sample(sampler, prefilled, rows[2:])
    assert tokens == [int(rows[2].argmax())], "a middle chunk is thrown away"

    second.extend_end = PROMPT_LEN
    info.merge_batch(prefilled)
    rows = logits(1, 3)
    tokens, told = sample(sampler, info, rows)
    assert tokens == [0, int(rows[1].argmax()), 250]
    assert_told(told[0], rows[0], [13, 14])
    assert_told(told[2], rows[2], [21, 22])

    info.filter_batch([2], torch.tensor([2]))  # the others have finished
    rows = logits(2, 1)
    tokens, told = sample(sampler, info, rows)
    assert tokens == [6]
    assert_told(told[0], rows[0], [23, 24])


def test_only_rows_that_name_the_processor_change(sampler: Sampler) -> None:
    batch = Batch([request("plain", None), request("forced", [5], [11, 12])])
    info = info_of(batch)
    rows = logits(3, 2)
    changed = rows.clone()
    apply_custom_logit_processor(changed, info)
    assert torch.equal(changed[0], rows[0])
    assert int(changed[1].argmax()) == 5
