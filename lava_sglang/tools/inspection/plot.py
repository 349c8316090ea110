# SPDX-License-Identifier: Apache-2.0
"""What a method keeps of a prompt, as a picture: layers, heads, and one layer's tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lava_sglang.tools.inspection.kept import KeptPrompt

WIDTH, DPI = 9.0, 110  # inches, pixels an inch: 990 pixels
MAX_BINS = 400  # of the token axis
BAR, CHOSEN = "#33638d", "#d1495b"


def save_plot(kept: KeptPrompt, layer: int, path: Path) -> None:
    """Write the picture in the format of the path's ending. Raises OSError or ValueError."""
    heads = len(kept.counts[0])
    rows = min(max(heads, 3), 16)
    heights = [1.5, 0.28 * rows + 0.3, 0.28 * rows + 0.3]
    figure = Figure(figsize=(WIDTH, sum(heights) + 2.4), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"{kept.method}: {kept.budget:,} of {kept.prompt_len:,} entries a KV head on average "
        f"({kept.budget / kept.prompt_len:.0%})",
        fontsize=13,
    )
    layers_axes, heads_axes, tokens_axes = figure.subplots(3, 1, height_ratios=heights)
    heads_axes.sharex(layers_axes)
    _draw_layers(layers_axes, kept, layer)
    _draw_heads(figure, heads_axes, kept, layer)
    _draw_tokens(figure, tokens_axes, kept, layer)
    figure.savefig(path)


def _draw_layers(axes: Axes, kept: KeptPrompt, layer: int) -> None:
    means = kept.layer_means
    colors = [BAR] * len(means)
    colors[layer] = CHOSEN
    axes.bar(range(len(means)), means, color=colors)
    axes.axhline(kept.budget, color="black", linewidth=1, linestyle="--")
    axes.set_title(f"Layer budgets (dashed: the mean, {kept.budget:,})", loc="left", fontsize=11)
    axes.set_ylabel("entries a head\n(mean)")
    axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heads(figure: Figure, axes: Axes, kept: KeptPrompt, layer: int) -> None:
    counts = np.array(kept.counts).T  # [H, L]
    # Alike for every method: the mean is in the middle, unless a head keeps twice as much.
    most = max(counts.max(), min(2 * kept.budget, kept.prompt_len))
    image = axes.imshow(
        counts, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest"
    )
    axes.add_patch(_frame(layer, len(counts)))
    least, most = counts.min(), counts.max()
    between = f"{least:,} to {most:,}" if least < most else f"all {most:,}"
    axes.set_title(f"Head budgets ({between} entries)", loc="left", fontsize=11)
    axes.set_xlabel(f"layer (framed: {layer})")
    axes.set_ylabel("KV head")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.colorbar(image, ax=axes, label="entries kept\n(window included)", pad=0.01)


def _frame(layer: int, heads: int) -> Rectangle:
    return Rectangle((layer - 0.5, -0.5), 1, heads, fill=False, edgecolor=CHOSEN, linewidth=2)


def _draw_tokens(figure: Figure, axes: Axes, kept: KeptPrompt, layer: int) -> None:
    edges = np.linspace(0, kept.prompt_len, min(kept.prompt_len, MAX_BINS) + 1).round()
    found = [np.histogram(tokens, edges)[0] for tokens in kept.tokens[layer]]
    share = 100 * np.stack(found) / np.diff(edges)  # [H, bins]
    image = axes.imshow(
        share,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=100,
        interpolation="nearest",
        extent=(0, kept.prompt_len, len(share) - 0.5, -0.5),
    )
    for boundary in range(1, len(share)):
        axes.axhline(boundary - 0.5, color="lightgray", linewidth=1)
    axes.axvline(kept.prompt_len - kept.window_size, color=CHOSEN, linewidth=1.5)
    axes.set_title(
        f"Layer {layer}: which tokens each head keeps (right of the line: the window of "
        f"{kept.window_size}, always kept)",
        loc="left",
        fontsize=11,
    )
    axes.set_xlabel("token position in the prompt")
    axes.set_ylabel("KV head")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.colorbar(image, ax=axes, label="% of tokens kept\n(of each bin)", pad=0.01)
