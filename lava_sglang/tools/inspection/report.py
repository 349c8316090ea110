# SPDX-License-Identifier: Apache-2.0
"""What a method keeps of a prompt, as text: a summary, a row per layer, one layer's kept words."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lava_sglang.tools.inspection.kept import KeptPrompt, runs

LONGEST_RUNS = 8
"""Stretches of text shown of a head."""

RUN_CHARACTERS = 90


def report(kept: KeptPrompt, layer: int, text_of: Callable[[range], str]) -> RenderableType:
    """text_of: the text of a stretch of the prompt's tokens."""
    return Group(
        summary(kept),
        Text(),
        layer_table(kept, layer),
        Text(),
        kept_text(kept, layer, text_of),
    )


def summary(kept: KeptPrompt) -> RenderableType:
    counts = [count for heads in kept.counts for count in heads]
    layers, heads = len(kept.counts), len(kept.counts[0])
    everything = kept.prompt_len * len(counts)
    table = Table.grid(padding=(0, 2))
    table.add_row("method", kept.method)
    table.add_row("prompt", f"{kept.prompt_len:,} tokens, the last {kept.window_size} the window")
    table.add_row("budget", f"{kept.budget:,} entries a head: the mean, window included")
    table.add_row(
        "kept",
        f"{sum(counts):,} of {everything:,} entries ({sum(counts) / everything:.1%}) "
        f"in {layers} layers of {heads} KV heads",
    )
    table.add_row("head budgets", f"{min(counts):,} to {max(counts):,} entries")
    means = kept.layer_means
    table.add_row("layer means", f"{min(means):,.0f} to {max(means):,.0f} entries a head")
    return table


def layer_table(kept: KeptPrompt, chosen: int) -> Table:
    """Entries kept, window included; the chosen layer in bold."""
    table = Table(box=None, pad_edge=False)
    table.caption = "weight: the layer's claim on the budget; in LAVa, its scores' entropy"
    for heading in ("layer", "entries", "of b", "weight", "least", "head", "most", "head"):
        table.add_column(heading, justify="right")
    for layer, heads in enumerate(kept.counts):
        least, most = min(heads), max(heads)
        table.add_row(
            str(layer),
            f"{sum(heads):,}",
            f"{sum(heads) / len(heads) / kept.budget:.0%}",
            f"{kept.weights[layer]:.3f}",
            f"{least:,}",
            _head_of(heads, least),
            f"{most:,}",
            _head_of(heads, most),
            style="bold" if layer == chosen else "",
        )
    return table


def _head_of(heads: list[int], count: int) -> str:
    return "all" if min(heads) == max(heads) else str(heads.index(count))


def kept_text(kept: KeptPrompt, layer: int, text_of: Callable[[range], str]) -> RenderableType:
    """Of each head of a layer, the longest stretches before the window, in the prompt's order."""
    lines = [Text(f"What layer {layer} keeps, beside the window", style="bold")]
    window_start = kept.prompt_len - kept.window_size
    for head, positions in enumerate(kept.tokens[layer]):
        found = runs([token for token in positions if token < window_start])
        longest = sorted(sorted(found, key=len, reverse=True)[:LONGEST_RUNS], key=min)
        heading = f"head {head}: {len(positions) - kept.window_size:,} entries in {len(found):,} "
        heading += f"stretches, the longest {len(longest)}:"
        lines.append(Text(heading, style="cyan"))
        for run in longest:
            line = Text(f"  {run.start:>6,}-{run.stop - 1:<6,} ", style="dim", no_wrap=True)
            line.append(_shortened(text_of(run)), style="not dim")
            lines.append(line)
    return Group(*lines)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    if len(words) <= RUN_CHARACTERS:
        return words
    half = RUN_CHARACTERS // 2 - 2
    return f"{words[:half]} ... {words[-half:]}"
