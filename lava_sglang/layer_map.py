# SPDX-License-Identifier: Apache-2.0
"""Which of a model's layers hold entries, where, and how far each looks back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerMap:
    """The layers of an arena, in order; of a plain model, all its layers.

    A *full* layer attends to all tokens up to its own: these compete for the budget. A *sliding*
    one attends to the last `sliding_window` of them, its own included. It keeps those whatever they
    score, and loses nothing.

    layer_ids: SGLang's id of each arena layer. sliding: the arena layers that slide; at least one
    does not. sliding_window: tokens, 0 if no layer slides. device: of the tensors.
    """

    def __init__(
        self,
        layer_ids: Sequence[int],
        sliding: Sequence[int] = (),
        sliding_window: int = 0,
        device: torch.device | str = "cpu",
    ):
        assert bool(sliding) is (sliding_window > 0), (sliding, sliding_window)
        self.sliding_window = sliding_window
        self.sliding = tuple(sliding)
        self.full = tuple(layer for layer in range(len(layer_ids)) if layer not in self.sliding)
        assert self.full, "a model whose layers all slide has nothing to compress"
        self.full_index = torch.tensor(self.full, device=device)
        self.sliding_index = torch.tensor(self.sliding, dtype=torch.int64, device=device)
        self._arena_layers = {layer_id: layer for layer, layer_id in enumerate(layer_ids)}
        self._places = {layer_ids[layer]: place for place, layer in enumerate(self.full)}

    @classmethod
    def plain(cls, num_layers: int, device: torch.device | str = "cpu") -> LayerMap:
        """All layers hold entries, and attend to everything."""
        return cls(range(num_layers), device=device)

    @property
    def num_layers(self) -> int:
        return len(self._arena_layers)

    def arena_layer(self, layer_id: int) -> int:
        """Where the entries of SGLang's layer are."""
        return self._arena_layers[layer_id]

    def place_among_full(self, layer_id: int) -> int | None:
        """Of SGLang's layer; None if it slides."""
        return self._places.get(layer_id)

    def window_of(self, layer_id: int) -> int:
        """Tokens that SGLang's layer attends to, its own included; 0: all."""
        return 0 if layer_id in self._places else self.sliding_window

    def sliding_kept(self, window_size: int) -> int:
        """The fewest entries that a sliding layer keeps of a suffix: what the next token can see,
        and the observation window."""
        return max(self.sliding_window - 1, window_size)

    def fewest_slots(self, window_size: int, ragged: bool) -> int:
        """Slots of the smallest tape: what sliding layers keep, and the window and one more entry
        in the full ones. ragged: whether layers may keep different numbers."""
        least = window_size + 1
        if not self.sliding:
            return least
        kept = self.sliding_kept(window_size)
        if not ragged:
            return max(kept, least)
        return -(-(len(self.sliding) * kept + len(self.full) * least) // self.num_layers)

    def most_slots(self, suffix_len: int, window_size: int, ragged: bool) -> int:
        """Slots past which a tape would keep entries that nothing reads; `fewest_slots` has the
        arguments."""
        if not self.sliding or not ragged:
            return suffix_len
        kept = min(self.sliding_kept(window_size), suffix_len)
        return -(-(len(self.sliding) * kept + len(self.full) * suffix_len) // self.num_layers)
