# SPDX-License-Identifier: Apache-2.0
"""Time of one prompt's compression, step by step, beside the prefill of the same prompt.

The steps are those of the server: score, weigh the layers, choose (split the budget over layers,
select), copy onto the tape, write the row of the tables. Taking the slots and handing the exact
prompt to the radix tree is host work of SGLang's own and is not in it. The prefill is a
transformers forward pass of the same model in the same dtype, on the same threads, in chunks like
the server's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads disturb

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.kernels.timing import Timing
from lava_sglang.config import KVCompressionConfig
from lava_sglang.kernels.compact import compact
from lava_sglang.mem_cache.arena import create_arena
from lava_sglang.mem_cache.tape import TapeTable
from lava_sglang.methods import METHOD_CHOICES
from lava_sglang.policy import PromptScores, PromptView, method_of, select_entries
from lava_sglang.tools.inspection.prefill import Prefill, load_model, prefill
from lava_sglang.tools.machine import process_line, write_report
from lava_sglang.tools.passages import Prompt, long_prompts, python_topics, text_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PREFILL, TOTAL = "prefill", "compression"
STEPS = ("score", "weights", "choose", "copy", "tables")


class Stopwatch:
    """Marks along one stream of work, by CUDA events on a GPU and by the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between each mark and the next. Waits for the device."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_gpu:
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


class CompressedPrompt:
    """A prefilled prompt in an arena with room for its tape, in slots in random order."""

    def __init__(self, done: Prefill, config: KVCompressionConfig):
        num_layers, _, prompt_len, num_kv_heads, head_dim = done.arena.shape
        device = done.arena.device
        self.method = method_of(config)
        (self.budget,) = config.rungs(prompt_len, page_size=1)
        num_slots = 1 + prompt_len + self.budget  # slot 0 is padding
        self.arena = create_arena(
            num_layers, num_slots, num_kv_heads, head_dim, done.arena.dtype, device
        )
        generator = torch.Generator().manual_seed(0)
        slots = (1 + torch.randperm(num_slots - 1, generator=generator)).to(device)
        prompt_slots, self.tape_slots = slots[:prompt_len], slots[prompt_len:]
        self.arena[:, :, prompt_slots] = done.arena
        self.view = PromptView(
            arena=self.arena,
            slots=prompt_slots,
            layers=done.layers,
            queries=done.queries,
            scaling=done.scaling,
            shared_prefix_len=0,
            window_size=config.window_size,
        )
        self.table = TapeTable(2, num_layers, num_kv_heads, device)

    def compress(self) -> dict[str, float]:
        """Seconds of each step. Writes the tape and its table again."""
        watch = Stopwatch(self.arena.device)
        entries = self.method.score(self.view).contiguous()
        watch.mark()
        scores = PromptScores(entries, self.method.layer_weights(entries))
        watch.mark()
        kept = select_entries(self.method, scores, self.view, self.budget)
        watch.mark()
        compact(self.arena, self.view.slots, self.tape_slots, kept.tape_tokens, kept.offsets)
        watch.mark()
        removed = len(self.view.slots) - self.budget
        self.table.commit(1, 0, self.budget, removed, kept.offsets)
        watch.mark()
        return dict(zip(STEPS, watch.seconds(), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = KVCompressionConfig.parse(
        {"method": arguments.method, "budget": arguments.budget}, display=lambda name: f"--{name}"
    )
    if not config.rungs(arguments.prompt_tokens, page_size=1):
        raise SystemExit(
            f"--budget={arguments.budget:g}: keeps all {arguments.prompt_tokens} tokens"
        )
    timings = {name: Timing() for name in (PREFILL, *STEPS, TOTAL)}
    prompts = _prompts(arguments)
    console = Console()
    for times in track(
        measure(arguments, config, prompts), total=len(prompts), console=Console(stderr=True)
    ):
        for name, samples in times.items():
            timings[name].samples += samples
    console.print(_table(arguments, timings))
    machine = process_line()
    console.print(machine, highlight=False, soft_wrap=True)
    write_report(
        arguments,
        machine,
        prompts=[prompt.title for prompt in prompts],
        seconds={name: timing.as_json() for name, timing in timings.items()},
        share_of_prefill=timings[TOTAL].median / timings[PREFILL].median,
    )


def measure(
    arguments: argparse.Namespace, config: KVCompressionConfig, prompts: Sequence[Prompt]
) -> Iterator[dict[str, list[float]]]:
    """Seconds by step, prompt by prompt: one prefill, then `repeats` compressions of it."""
    device = torch.device(arguments.device)
    model = load_model(
        arguments.model_path, DTYPES[arguments.dtype], device, arguments.load_format == "dummy"
    )
    warm_up = prompts[0].input_ids
    if device.type == "cuda":
        prefill(model, warm_up, config.window_size, arguments.chunk_tokens)
    for prompt in prompts:
        watch = Stopwatch(device)
        done = prefill(model, prompt.input_ids, config.window_size, arguments.chunk_tokens)
        watch.mark()
        times: dict[str, list[float]] = {PREFILL: watch.seconds(), TOTAL: []}
        compressed = CompressedPrompt(done, config)
        del done
        compressed.compress()  # compiles, and brings the tape's pages in
        for _ in range(arguments.repeats):
            steps = compressed.compress()
            for name, seconds in steps.items():
                times.setdefault(name, []).append(seconds)
            times[TOTAL].append(sum(steps.values()))
        yield times


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    folder = arguments.text_dir
    texts = python_topics() if folder is None else text_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    return long_prompts(tokenizer, texts, arguments.prompts, arguments.prompt_tokens)


def _table(arguments: argparse.Namespace, timings: dict[str, Timing]) -> Table:
    table = Table(
        title=f"{arguments.prompts} prompts of {arguments.prompt_tokens:,} tokens, "
        f"{arguments.method} at budget {arguments.budget:g}, {arguments.dtype}, {arguments.device}",
        caption="ms: median [10% - 90%] minimum. The share is of the prefill, of medians.",
    )
    for heading in ("", "ms", "share"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    prefill_time = timings[PREFILL].median
    for name, timing in timings.items():
        share = f"{timing.median / prefill_time:.2%}"
        table.add_row(name, timing.milliseconds(), share, end_section=name in (PREFILL, STEPS[-1]))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    methods = [method for method in METHOD_CHOICES if method != "none"]
    add("--model-path", required=True, help="a Hugging Face folder or name")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    add("--prompts", type=int, default=3, help="how many, each with another passage")
    add("--prompt-tokens", type=int, default=4096)
    add("--text-dir", type=Path, help="folder of .txt files (default: the Python reference)")
    add("--method", choices=methods, default="lava")
    add("--budget", type=float, default=0.25, help="a fraction, or a number of tokens")
    add("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32")
    add("--device", default="cuda" if gpu else "cpu")
    add("--threads", type=int, default=0, help="torch's number of threads (default: torch's own)")
    add("--chunk-tokens", type=int, default=2048, help="of a prefill step, as in the server")
    add("--repeats", type=int, default=10, help="compressions of each prompt")
    add("--json", type=Path, help="write the result to this file too")
    return parser


if __name__ == "__main__":
    main()
