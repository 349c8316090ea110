# SPDX-License-Identifier: Apache-2.0
"""What a decode kernel reads of a batch: where each request's entries are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BatchTables(NamedTuple):
    """The batch in its order, and the tables of all rows, at fixed addresses for CUDA graphs."""

    req_to_token: torch.Tensor
    """int32 [rows, max_context_len], the slots of each request in order."""

    req_pool_indices: torch.Tensor
    """[bs] integer, the row of each request: the tables below are indexed by it."""

    seq_lens: torch.Tensor
    """[bs] integer, physical lengths P + b + tail, the new token included."""

    prefix_lens: torch.Tensor
    """int32 [rows], P: exact entries before the tape. Unused where the budget is 0."""

    budgets: torch.Tensor
    """int32 [rows], b: slots of the tape; 0 where uncompressed, then all of the row is read."""

    offsets: torch.Tensor
    """int32 [rows, num_layers * num_kv_heads + 1], first tape place of each (layer, head)."""
