# SPDX-License-Identifier: Apache-2.0
"""A reply that is told token by token, and the log-probabilities of chosen tokens along it.

A custom logit processor of SGLang's: it runs in a server that was started with
`--enable-custom-logit-processor`, over whatever is left of the prompt. SGLang returns
log-probabilities of what a processor made of the logits, so it leaves the answer there.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHIFT = 32.0
"""The forced token has log-probability 0, what is to be told stands SHIFT nats below its own: the
sum rounds to 1 in float32, and 4e-6 of each value is lost."""

_ABSENT = -1e4  # of every other token


class ForcedTokens:
    """Makes token `forced_tokens[step]` the most likely one at each step of a request.

    The columns of `watched_columns`, k + 1 token ids that are never forced, then hold the
    log-probabilities, less SHIFT, of k tokens `watched_tokens[step * k : (step + 1) * k]`, and of
    the most likely token. All three are lists in the request's `custom_params`.
    """

    @classmethod
    def to_str(cls) -> str:
        """What `custom_logit_processor` of a request takes. A reference: the server imports it."""
        return json.dumps({"callable": pickle.dumps(cls).hex()})

    def __call__(self, logits: Tensor, custom_param_list: Sequence[dict[str, Any]]) -> Tensor:
        """logits [rows, vocabulary], changed in place and returned."""
        for row, params in zip(logits, custom_param_list, strict=True):
            request = params["__req__"]
            # A middle chunk of a prompt is sampled from too, and thrown away.
            if request.extend_end >= len(request.origin_input_ids):
                step = params.get("forced_steps", 0)
                params["forced_steps"] = step + 1
                if step < len(params["forced_tokens"]):
                    _force(row, step, params)
        return logits


def _force(row: Tensor, step: int, params: dict[str, Any]) -> None:
    columns = params["watched_columns"]
    count = len(columns) - 1
    watched = params["watched_tokens"][step * count : (step + 1) * count]
    found = row.float().log_softmax(dim=0)
    told = torch.cat([found[watched], found.max()[None]]) - SHIFT
    row.fill_(_ABSENT)
    row[columns] = told.to(row.dtype)
    row[params["forced_tokens"][step]] = 0
