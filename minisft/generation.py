"""Greedy decoding of many prompts at once, with the results of one at a time.

Prompts of like length are padded on the left and answered together. A row leaves its batch when it ends, so nobody
computes for it any longer; keys and values lie in memory with room to grow, so a step copies none of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minisft.batches import pad_left

DECODING = "minisft_decoding"
ROOM = 32  # tokens by which the memory for keys and values grows


@dataclass(frozen=True)
class Reply:
    """The ids that a model answered to the prompt number `index`, without EOS; `stopped` if it ended with EOS."""

    index: int
    ids: list[int]
    stopped: bool


def replies(
    model: Any, prompts: Sequence[list[int]], *, eos_id: int, pad_id: int, max_new_tokens: int, batch_size: int
) -> Iterator[Reply]:
    """The most likely token after token (greedy decoding), at most `max_new_tokens`, after each of `prompts`.

    Replies come as they end, each prompt's once. Penalties and samplings of a `generation_config` have no part.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with _decoding(model):
            yield from _batch(model, chosen, [prompts[i] for i in chosen], eos_id, pad_id, max_new_tokens)


def stream(model: Any, prompt: list[int], *, eos_id: int, max_new_tokens: int) -> Iterator[int]:
    """The ids of one reply as they come, without EOS."""
    with _decoding(model):
        for step in _steps(model, [prompt], eos_id, max_new_tokens):
            token = step.tokens[0]
            if token == eos_id:
                return
            yield token


def _batch(
    model: Any, chosen: list[int], prompts: list[list[int]], eos_id: int, pad_id: int, most: int
) -> Iterator[Reply]:
    said: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, pad_id, most):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token == eos_id:
                step.end(row)
                yield Reply(chosen[row], said[row], True)
            else:
                said[row].append(token)
                if len(said[row]) == most:
                    step.end(row)
                    yield Reply(chosen[row], said[row], False)


@dataclass
class _Step:
    """One token for each row of a batch that has not ended; `end` takes a row out before the next step."""

    rows: list[int]
    tokens: list[int]
    ended: set[int]

    def end(self, row: int) -> None:
        self.ended.add(row)


def _steps(model: Any, prompts: list[list[int]], pad_id: int, most: int) -> Iterator[_Step]:
    import torch

    batch = {name: tensor.to(model.device) for name, tensor in pad_left(prompts, pad_id).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    takes = inspect.signature(model.forward).parameters
    cache = _cache(model)
    rows = list(range(len(prompts)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(most):
        given = {"position_ids": positions, "logits_to_keep": 1}
        padded = not bool(mask.all())
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=mask if padded else None,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in given.items() if name in takes},
            ).logits[:, -1]
        chosen = logits.argmax(-1)
        step = _Step(rows, chosen.tolist(), set())
        yield step
        if step.ended:
            left = [i for i, row in enumerate(rows) if row not in step.ended]
            if not left:
                return
            rows = [rows[i] for i in left]
            kept = torch.tensor(left, device=mask.device)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
            cache.batch_select_indices(kept)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def _cache(model: Any) -> Any:
    """transformers' own cache of keys and values, whose plain layers grow in place."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)
    roomy = _roomy_layer()
    cache.layers = [roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@functools.cache
def _roomy_layer() -> type:
    import torch
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values, [rows, heads, tokens, head size], as the beginning of larger tensors."""

        room: tuple[Any, Any] | None = None

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            had = self.get_seq_length()
            length = had + key_states.shape[-2]
            if self.room is None or self.room[0].shape[-2] < length:
                self.room = tuple(self._larger(new, length + ROOM) for new in (key_states, value_states))
                if had:
                    for place, old in zip(self.room, (self.keys, self.values), strict=True):
                        place[..., :had, :] = old
            for place, new in zip(self.room, (key_states, value_states), strict=True):
                place[..., had:length, :] = new
            self.keys, self.values = (place[..., :length, :] for place in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self.room = None

        @staticmethod
        def _larger(like: Any, length: int) -> Any:
            return torch.empty((*like.shape[:2], length, like.shape[-1]), dtype=like.dtype, device=like.device)

    return RoomyLayer


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """Let `model` attend in the way that is quick for one new token per row, where it takes its attention so."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    _register()
    model.set_attn_implementation(DECODING)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def decoding_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        """For one new token: query heads that share a key head are asked as if they were positions of it.

        `query` is [rows, heads, 1, head size], `key` and `value` [rows, key heads, tokens, head size]. Nothing is
        repeated for the heads that share, and what is summed is the same.
        """
        import torch

        if query.shape[2] > 1 or kwargs.get("sliding_window") or kwargs.get("softcap"):
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        rows, heads, _, size = query.shape
        together = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
        out = torch.nn.functional.scaled_dot_product_attention(
            together, key, value, attn_mask=mask, scale=kwargs.get("scaling")
        )
        return out.reshape(rows, 1, heads, size), None

    AttentionInterface.register(DECODING, decoding_attention)
    AttentionMaskInterface.register(DECODING, sdpa_mask)
