# SPDX-License-Identifier: Apache-2.0
"""Whether a peer here is what kvpress does: next tokens over kvpress's own cache against ours.

kvpress prefills, compresses by its own hooks and decodes by its own attention, token after token,
which it does with transformers below 5.3 only. Our side is what `divergence` measures. Exits with 1
if they differ for a press that does not draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from contexts import Cutter
from continuation import continuation_logits, mean_kept
from divergence import compare
from options import add_model_arguments, integers, load_model_and_tokenizer
from peers import Peer, parse_peers, recorded, removed_share
from rich.console import Console
from rich.progress import track
from rich.table import Table
from texts import load_texts
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from lava_sglang.tools.inspection.prefill import prefill

SAME_KL = 1e-6
"""Nats: what float32 leaves between two ways to the same logits, at most."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=["kvpress"], metavar="kvpress:PRESS")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--lengths", type=integers, default="512,1024", help="prompt tokens")
    parser.add_argument("--budget", type=int, default=128, help="entries per layer and head")
    parser.add_argument("--new-tokens", type=int, default=8)
    arguments = parser.parse_args(argv)
    peers = [peer for spec in arguments.methods for peer in parse_peers(spec)]
    model, tokenizer = load_model_and_tokenizer(arguments)
    stock = {
        attention: AutoModelForCausalLM.from_pretrained(
            arguments.model_path, dtype=model.dtype, attn_implementation=attention
        )
        .to(model.device)
        .eval()
        for attention in {_attention_of(peer) for peer in peers}
    }
    cutter = Cutter(tokenizer, load_texts(arguments.data), arguments.seed)
    prompts = list(
        cutter.book_contexts(arguments.lengths, arguments.new_tokens + 1, arguments.contexts)
    )
    differing: list[str] = []
    table = Table("press", "prompt", "kept", "KL(kvpress || ours)", "KL(exact || ours)")
    for context in track(prompts, "Contexts", console=Console(stderr=True)):
        assert context.continuation is not None
        fed, targets = context.continuation[:-1], torch.tensor(context.continuation[1:])
        with recorded(model, peers) as inputs:
            exact = prefill(model, context.prompt, 1)
        full = continuation_logits(model, exact, fed, [None])[0].log_softmax(dim=1)
        for peer in peers:
            (columns,) = peer.choose(exact, inputs, [arguments.budget])
            ours = continuation_logits(model, exact, fed, [columns])[0]
            theirs = decode(stock[_attention_of(peer)], peer, context.prompt, fed, arguments.budget)
            found = compare(theirs.log_softmax(dim=1), ours, targets.to(ours.device))
            moved = compare(full, ours, targets.to(ours.device))
            kept = mean_kept(columns, exact.prompt_len)
            row = (peer.label, str(exact.prompt_len), f"{kept:g}")
            table.add_row(*row, f"{found['kl']:.2e}", f"{moved['kl']:.2e}")
            if not peer.draws and not abs(found["kl"]) <= SAME_KL:  # nor if it is not a number
                differing.append(f"{peer.label} at {exact.prompt_len} tokens: {found['kl']:.2e}")
    Console().print(table)
    if differing:
        raise SystemExit(f"KL(kvpress || ours) above {SAME_KL:g}: {', '.join(differing)}")


@torch.no_grad()
def decode(model: Any, peer: Peer, prompt: list[int], fed: list[int], budget: int) -> Tensor:
    """Logits [T, vocabulary] after each of T forced tokens, all of it by kvpress."""
    press = peer.new_press(score_once=False)
    press.compression_ratio = removed_share(budget, len(prompt))
    cache = DynamicCache()
    torch.manual_seed(0)
    with press(model):
        model(torch.tensor([prompt], device=model.device), past_key_values=cache)
    logits = []
    for number, token in enumerate(fed):
        position = torch.tensor([len(prompt) + number], device=model.device)
        step = model(
            torch.tensor([[token]], device=model.device),
            past_key_values=cache,
            position_ids=position[None],
            # What the cache holds is fewer than the position says: the mask is to hide nothing.
            cache_position=torch.tensor([cache.get_seq_length()], device=model.device),
        )
        logits.append(step.logits[0, -1].float())
    return torch.stack(logits)


def _attention_of(peer: Peer) -> str:
    return "eager" if peer.needs_attention else "sdpa"


if __name__ == "__main__":
    main()
