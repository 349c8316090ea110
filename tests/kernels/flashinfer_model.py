# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's paged decode wrapper and state merge in torch, by their documentation.

Source: the docstrings of flashinfer-python 0.7.2 (`decode.py`, `cascade.py`), and `cascade.cuh` for
the base of the logsumexp. What they leave open is made to show: scratch and rows without a page
give NaN, and what is called out of turn or out of range fails.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch


class BatchDecodeWithPagedKVCacheWrapper:
    """The arguments that we name, and no others. `plans` counts calls of `plan`."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        backend: str = "auto",
    ):
        assert kv_layout == "NHD" and backend in ("auto", "fa2")
        assert not float_workspace_buffer[:4096].any(), "must be initialised to 0 for its first use"
        self.use_tensor_cores = use_tensor_cores
        self.plans = 0

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
        self.int_workspace_buffer = int_workspace_buffer

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **kwargs: object,
    ) -> None:
        self._plan_impl(
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            **kwargs,  # type: ignore[arg-type]
        )

    def _plan_impl(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        batch_size = len(last_page_len)
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert indptr.shape == (batch_size + 1,) and indptr.is_contiguous()
        assert int(indptr[0]) == 0 and bool((indptr.diff() >= 0).all())
        assert indices.shape == (int(indptr[-1]),), "[indptr[-1]]"
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        assert num_qo_heads % num_kv_heads == 0
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16)
        assert indptr.device.type == last_page_len.device.type == "cpu", "read on the host"
        self.indptr = indptr.clone()
        self.indices = indices  # not copied if it is on the device
        self.last_page_len = last_page_len.clone()
        self.heads = num_qo_heads, num_kv_heads
        self.head_dim, self.page_size = head_dim, page_size
        self.dtypes = q_data_type, kv_data_type or q_data_type
        self.sm_scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        self.plans += 1

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Output [batch_size, num_qo_heads, head_dim], logsumexp [batch_size, num_qo_heads]."""
        num_qo_heads, num_kv_heads = self.heads
        k_cache, v_cache = paged_kv_cache
        assert q.shape == (len(self.last_page_len), num_qo_heads, self.head_dim), q.shape
        assert q.is_contiguous()
        assert k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride()
        assert k_cache.shape[1:] == (self.page_size, num_kv_heads, self.head_dim), k_cache.shape
        assert (q.dtype, k_cache.dtype) == self.dtypes
        out = torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:2], float("nan"), dtype=torch.float32)
        for row in range(len(q)):
            pages = self.indices[self.indptr[row] : self.indptr[row + 1]].long()
            if not len(pages):
                continue
            assert bool(((pages >= 0) & (pages < len(k_cache))).all())
            length = (len(pages) - 1) * self.page_size + int(self.last_page_len[row])
            # [num_kv_heads, length, head_dim]
            k = k_cache[pages].flatten(0, 1)[:length].float().transpose(0, 1)
            v = v_cache[pages].flatten(0, 1)[:length].float().transpose(0, 1)
            queries = q[row].float().view(num_kv_heads, -1, self.head_dim)
            logits = queries @ k.mT * self.sm_scale
            out[row] = (logits.softmax(-1) @ v).flatten(0, 1).to(q.dtype)
            lse[row] = logits.logsumexp(-1).flatten() * math.log2(math.e)
        return (out, lse) if return_lse else out


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """v: [seq_len, num_heads, head_dim], s: float32 [seq_len, num_heads], base 2; both mutated.

    mask: bool [seq_len], the sequences to merge.
    """
    assert v.shape == v_other.shape and s.shape == s_other.shape == v.shape[:2]
    assert s.dtype == s_other.dtype == torch.float32 and v.dtype == v_other.dtype
    assert all(tensor.is_contiguous() for tensor in (v, s, v_other, s_other))
    if mask is None:
        mask = torch.ones(len(v), dtype=torch.bool)
    assert mask.dtype == torch.bool and mask.shape == (len(v),) and mask.is_contiguous()
    top = torch.maximum(s, s_other)
    own, other = torch.exp2(s - top), torch.exp2(s_other - top)
    total = own + other
    # As cascade.cuh does: a small share as 1 minus a large one would be rounding error alone.
    shares = (own / total)[..., None], (other / total)[..., None]
    merged = (v.float() * shares[0] + v_other.float() * shares[1]).to(v.dtype)
    v[mask] = merged[mask]
    s[mask] = (top + torch.log2(total))[mask]


FLASHINFER = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    merge_state_in_place=merge_state_in_place,
)
"""In the place of the module."""
