# SPDX-License-Identifier: Apache-2.0
"""Every op in plain torch, in the order of a prompt's life: score, split, select, compact, decode.

The kernels are tested against it, and it runs on any device. The equations: policy/README.md.
"""

from __future__ import annotations

import heapq
import math
from fractions import Fraction

import torch
import torch.nn.functional as F

from lava_sglang.kernels.batch_tables import BatchTables
from lava_sglang.kernels.score_options import LAVA, ScoreOptions

# Score: how important each entry is.


def window_attention_ref(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    logit_cap: float = 0.0,
    query_weights: torch.Tensor | None = None,
    root_mean_square: bool = False,
    absent: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean causal attention that the last W tokens pay to each token of the prompt.

    queries: [W, num_qo_heads, head_dim], after RoPE, of the last W tokens.
    keys: [prompt_len, num_kv_heads, head_dim], after RoPE.
    scaling: factor on the logits, 1/sqrt(head_dim) in most models. logit_cap: as of `capped_ref`.
    query_weights: float32 [W] with the sum 1, of the mean over the W tokens; None: all alike.
    root_mean_square: the quadratic mean in place of the arithmetic one.
    absent: bool [num_kv_heads, prompt_len], places where a head has no entry.
    Returns float32 [num_qo_heads, prompt_len]. Softmax in float32 over the whole prompt.
    Source: SnapKV, arXiv 2404.14469, eq. 1-2, with the mean in place of the sum.
    """
    num_queries, num_qo_heads, head_dim = queries.shape
    prompt_len, num_kv_heads, _ = keys.shape
    group = num_qo_heads // num_kv_heads
    # [num_kv_heads, group * W, head_dim]
    q = queries.float().transpose(0, 1).reshape(num_kv_heads, group * num_queries, head_dim)
    k = keys.float().permute(1, 2, 0)  # [num_kv_heads, head_dim, prompt_len]
    logits = torch.matmul(q * scaling, k).view(num_qo_heads, num_queries, prompt_len)
    logits = capped_ref(logits, logit_cap)
    # Query t stands at prompt_len - W + t and sees the tokens up to itself.
    hidden = torch.ones(num_queries, num_queries, dtype=torch.bool, device=q.device).triu(1)
    logits[:, :, prompt_len - num_queries :].masked_fill_(hidden, float("-inf"))
    if absent is not None:
        per_query = absent.repeat_interleave(group, dim=0)[:, None]
        logits.masked_fill_(per_query, float("-inf"))
    attention = logits.softmax(dim=-1)
    if root_mean_square:
        attention.square_()
    mean = attention.mean(dim=1) if query_weights is None else query_weights @ attention
    return mean.sqrt() if root_mean_square else mean


def capped_ref(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Logits in (-cap, cap), those near 0 as they are; cap 0 leaves them all. Source: Gemma 2,
    arXiv 2408.00118."""
    return cap * torch.tanh(logits / cap) if cap else logits


def max_pool_ref(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Running maximum over `width` neighbours of each token, ends clipped.

    scores: [rows, tokens]. width: odd. Returns the same shape and dtype.
    """
    return F.max_pool1d(scores[None], width, stride=1, padding=width // 2)[0]


def span_pool_ref(scores: torch.Tensor, span: int) -> torch.Tensor:
    """Running maximum over each token and the `span` before it.

    scores: [rows, tokens], non-negative. Returns the same shape and dtype.
    """
    return F.max_pool1d(F.pad(scores, (span, 0))[None], span + 1, stride=1)[0]


def finite_ref(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers` with 0 in the place of each that is infinite or not a number. A new tensor."""
    return numbers.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def importance_ref(
    attention: torch.Tensor,
    values: torch.Tensor,
    options: ScoreOptions = LAVA,
) -> torch.Tensor:
    """A score from one layer's attention.

    attention: float32 [num_qo_heads, tokens]. values: [tokens, num_kv_heads, head_dim].
    Returns float32 [num_kv_heads, tokens], all finite: what is not counts as 0, attention and norm
    of a value each by itself.
    """
    values = values.float().transpose(0, 1)
    num_kv_heads, num_tokens, _ = values.shape
    if options.value_norm == "token":
        group = attention.shape[0] // num_kv_heads
        attention = attention * values.norm(dim=-1).repeat_interleave(group, dim=0)
    attention = finite_ref(attention)
    pooled = torch.maximum(
        max_pool_ref(attention, options.pool_width),
        options.span_share * span_pool_ref(attention, options.span),
    )
    grouped = pooled.view(num_kv_heads, -1, num_tokens)
    score = grouped.amax(dim=1) if options.group_reduce == "max" else grouped.mean(dim=1)
    if options.value_norm == "head":
        score = score * finite_ref(values.abs().sum(dim=-1)).amax(dim=-1, keepdim=True)
    return finite_ref(score)


def window_scores_ref(
    queries: torch.Tensor,
    arena: torch.Tensor,
    prompt_slots: torch.Tensor,
    shared_prefix_len: int,
    window_size: int,
    scaling: float | torch.Tensor,
    options: ScoreOptions = LAVA,
    *,
    layers: torch.Tensor | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """`window_scores.window_scores`, one layer at a time: what the last queries of the prompt
    attend to, times how much its value can change the output."""
    num_layers = len(queries)
    scored = slice(shared_prefix_len, len(prompt_slots) - window_size)
    scales = torch.as_tensor(scaling, dtype=torch.float32).expand(num_layers).tolist()
    arena_layers = range(num_layers) if layers is None else layers.tolist()
    scores = []
    for own_queries, scale, layer in zip(queries, scales, arena_layers, strict=True):
        attention = window_attention_ref(
            own_queries,
            arena[layer, 0, prompt_slots],
            scale,
            logit_cap=logit_cap,
            query_weights=options.query_weights,
            root_mean_square=options.root_mean_square,
        )
        scores.append(
            importance_ref(
                attention[:, scored],
                arena[layer, 1, prompt_slots[scored]],
                options,
            )
        )
    return torch.stack(scores)


# Split: what each layer may keep.


def layer_entropy_ref(scores: torch.Tensor) -> torch.Tensor:
    """How evenly a layer's scores are spread over its heads and tokens: 0 one entry, 1 all equal.

    scores: float32 [num_layers, num_kv_heads, tokens], non-negative. Returns float32 [num_layers];
    0 where all scores are 0 or there is one entry. Source: LAVa, arXiv 2509.09754.
    """
    flat = scores.flatten(1)
    total = flat.sum(dim=1, keepdim=True)
    share = flat / total.where(total > 0, 1.0)
    return torch.special.entr(share).sum(dim=1) / math.log(max(flat.shape[1], 2))


def layer_split_ref(weights: list[float], total: int, cap: int) -> list[int]:
    """`layer_split.layer_split`, seat by seat in exact arithmetic.

    Each seat goes to the layer with the largest weight / (2 * seats + 1), ties to the lower.
    """
    shares = [max(1, min(round(Fraction(w) * 2**30), 2**30)) for w in weights]
    queue = [(-Fraction(share), layer) for layer, share in enumerate(shares)]
    heapq.heapify(queue)
    seats = [0] * len(weights)
    for _ in range(total):
        _, layer = heapq.heappop(queue)
        seats[layer] += 1
        if seats[layer] < cap:
            heapq.heappush(queue, (-Fraction(shares[layer], 2 * seats[layer] + 1), layer))
    return seats


# Select: which entries those are, and whose.


def select_ref(
    scores: torch.Tensor,
    layer_counts: torch.Tensor,
    first_token: int,
    window_size: int,
    head_floor: int | torch.Tensor = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`select.select` by stable sorts, one layer at a time. Returns (counts, offsets, tokens)."""
    num_layers, num_kv_heads, num_scored = scores.shape
    floors = torch.as_tensor(head_floor).expand(num_layers).tolist()
    window = torch.arange(window_size) + first_token + num_scored
    counts, tape = [], []
    for layer, count in enumerate(layer_counts.tolist()):
        floor = min(floors[layer], count // num_kv_heads, num_scored)
        kept = torch.zeros(num_kv_heads, num_scored, dtype=torch.bool)
        best = scores[layer].sort(dim=-1, descending=True, stable=True).indices
        kept.scatter_(1, best[:, :floor], True)
        order = scores[layer].flatten().sort(descending=True, stable=True).indices
        rest = order[~kept.flatten()[order]]
        kept.view(-1)[rest[: count - num_kv_heads * floor]] = True
        for head in range(num_kv_heads):
            tokens = torch.cat([kept[head].nonzero().flatten() + first_token, window])
            counts.append(len(tokens))
            tape.append(tokens)
    n = torch.tensor(counts, dtype=torch.int32)
    offsets = torch.cat([n.new_zeros(1), n.cumsum(0, dtype=torch.int32)])
    return n.view(num_layers, num_kv_heads), offsets, torch.cat(tape).int()


def tape_owners_ref(offsets: torch.Tensor) -> torch.Tensor:
    """The column (layer * num_kv_heads + head) that each tape place belongs to.

    offsets: integer [columns + 1], non-decreasing from 0. Returns int64 [offsets[-1]].
    """
    columns = torch.arange(len(offsets) - 1, device=offsets.device)
    return columns.repeat_interleave(offsets.diff())


# Compact: the kept entries onto the tape.


def compact_ref(
    arena: torch.Tensor,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    tape_tokens: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """`compact.compact`, one layer of the tape at a time. Mutates `arena`."""
    num_kv_heads, head_dim = arena.shape[3:]
    budget = len(dst_slots)
    owners = tape_owners_ref(offsets)
    for layer, tape in enumerate(torch.arange(len(tape_tokens)).split(num_kv_heads * budget)):
        slots = src_slots[tape_tokens[tape].long()]
        owner = owners[tape]
        kept = arena[owner // num_kv_heads, :, slots, owner % num_kv_heads]
        # [2, budget, num_kv_heads, head_dim]
        arena[layer][:, dst_slots] = kept.view(num_kv_heads, budget, 2, head_dim).permute(
            2, 1, 0, 3
        )


# Decode: attention over prefix, tape and tail.


def ragged_decode_ref(
    q: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: BatchTables,
    scaling: float,
    *,
    sliding_window: int = 0,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """`ragged_decode.ragged_decode`, one request and head at a time, in float32."""
    req_to_token, req_pool_indices, seq_lens, prefix_lens, budgets, offsets = tables
    num_kv_heads = arena.shape[3]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros_like(q)
    for i, row in enumerate(req_pool_indices.tolist()):
        slots = req_to_token[row, : int(seq_lens[i])].long()
        prefix_len, budget = int(prefix_lens[row]), int(budgets[row])
        for head in range(num_kv_heads):
            kv = arena[layer, :, slots, head].transpose(0, 1)  # [entries, 2, head_dim]
            if budget:
                column = layer * num_kv_heads + head
                tape = torch.arange(*offsets[row, column : column + 2].tolist(), device=q.device)
                column, place = tape // budget, tape % budget
                piece = arena[
                    column // num_kv_heads, :, slots[prefix_len + place], column % num_kv_heads
                ]
                kv = torch.cat([kv[:prefix_len], piece, kv[prefix_len + budget :]])
            kv = kv[-sliding_window:].float()
            k, v = kv[:, 0] * k_scale, kv[:, 1] * v_scale
            q_heads = slice(head * group, (head + 1) * group)
            if len(kv):
                logits = capped_ref(q[i, q_heads].float() @ k.T * scaling, logit_cap)
                attention = logits.softmax(-1)
                out[i, q_heads] = (attention @ v).to(q.dtype)
    return out


def tape_pages_ref(
    pages: torch.Tensor,
    starts: torch.Tensor,
    arena: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """`flashinfer_decode.tape_pages`, one request and layer at a time. Mutates `pages`."""
    req_to_token, req_pool_indices, _, prefix_lens, budgets, offsets = tables
    num_layers, _, slots, num_kv_heads, _ = arena.shape
    for i, row in enumerate(req_pool_indices.tolist()):
        prefix_len, budget = int(prefix_lens[row]), int(budgets[row])
        for layer in range(num_layers if budget else 0):
            piece = offsets[row, layer * num_kv_heads : (layer + 1) * num_kv_heads + 1]
            place = torch.arange(int(piece[0]), int(piece[-1]), device=pages.device)
            column, slot = place // budget, req_to_token[row, prefix_len + place % budget].long()
            plane = 2 * (column // num_kv_heads)
            start = int(starts[layer, i])
            pages[start : start + len(place)] = (
                (plane * slots + slot) * num_kv_heads + column % num_kv_heads
            ).int()


def exact_slots_ref(
    slots: torch.Tensor,
    indptr: torch.Tensor,
    tables: BatchTables,
    longest: int,
) -> None:
    """`flashinfer_decode.exact_slots`, one request at a time. Mutates `slots`."""
    req_to_token, req_pool_indices, _, prefix_lens, budgets, _ = tables
    for i, row in enumerate(req_pool_indices.tolist()):
        start, end = indptr[i : i + 2].tolist()
        place = torch.arange(end - start, device=slots.device)
        position = place.where(place < prefix_lens[row], place + budgets[row])
        slots[start:end] = req_to_token[row, position]
