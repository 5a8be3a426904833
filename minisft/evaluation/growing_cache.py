"""Keep keys and values in tensors with spare capacity, so most steps append without a copy."""

from __future__ import annotations

import functools
from typing import Any

ROOM = 32  # spare capacity of the key and value tensors, in tokens


def growing_cache(model: Any) -> Any:
    """Return transformers' cache, with its plain layers replaced by ones that grow in place."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)
    growing_layer = _growing_layer()
    cache.layers = [growing_layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@functools.cache
def _growing_layer() -> type:
    import torch
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values, [rows, heads, tokens, head size], at the start of larger tensors."""

        room: tuple[Any, Any] | None = None

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            old_length = self.get_seq_length()
            length = old_length + key_states.shape[-2]
            if self.room is None or self.room[0].shape[-2] < length:
                self.room = tuple(self._larger(new, length + ROOM) for new in (key_states, value_states))
                if old_length:
                    for buffer, old in zip(self.room, (self.keys, self.values), strict=True):
                        buffer[..., :old_length, :] = old
            for buffer, new in zip(self.room, (key_states, value_states), strict=True):
                buffer[..., old_length:length, :] = new
            self.keys, self.values = (buffer[..., :length, :] for buffer in self.room)
            return self.keys, self.values

        def put(self, row: int, keys: Any, values: Any, rows: int, longest: int) -> None:
            """Store one row's keys and values, [heads, tokens, head size], aligned on the right.

            `rows` is the number of rows, `longest` the length of the longest prompt.
            """
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                shape = (rows, len(keys), longest + ROOM)  # zeros, because NaN would spread even if masked
                self.room = tuple(part.new_zeros((*shape, part.shape[-1])) for part in (keys, values))
                self.keys, self.values = (buffer[..., :longest, :] for buffer in self.room)
            assert self.room is not None
            for buffer, part in zip(self.room, (keys, values), strict=True):
                buffer[row, :, longest - part.shape[1] : longest] = part

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self.room = None  # keys and values are copies now

        @staticmethod
        def _larger(like: Any, length: int) -> Any:
            return torch.empty((*like.shape[:2], length, like.shape[-1]), dtype=like.dtype, device=like.device)

    return GrowingLayer
