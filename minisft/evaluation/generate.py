"""Greedy decoding of many prompts at once, with the results of one at a time.

Prompts of like length are answered together. They are read end to end, without padding; then each row gets one token
a step. A row leaves its batch when it ends, so nobody computes for it any longer; keys and values lie in memory with
room to grow, so a step copies none of them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minisft.model.configs import positions_of
from minisft.training.collators import PaddingFree, pad_left, portions

DECODING = "minisft_decoding"
ROOM = 32  # tokens by which the memory for keys and values grows
READ_AT_ONCE = 4096  # tokens of prompts
HELD_AT_ONCE = 32_768  # tokens of a batch, padding and answers included: their keys and values are what fills memory


@dataclass(frozen=True)
class Reply:
    """The ids that a model answered to the prompt number `index`, without EOS; `stopped` if it ended with EOS."""

    index: int
    ids: list[int]
    stopped: bool


def generate_batched(
    model: Any, prompts: Sequence[list[int]], *, eos_id: int, pad_id: int, max_new_tokens: int, batch_size: int
) -> Iterator[Reply]:
    """The most likely token after token (greedy decoding), at most `max_new_tokens`, after each of `prompts`.

    Replies come as they end, each prompt's once. Penalties and samplings of a `generation_config` have no part. Where
    a model's positions end, so does the answer. Models that keep their past otherwise than as keys and values, or whose
    positions depend on the longest row, answer one at a time by transformers' own `generate`.
    """
    room = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    if not _keeps_keys_and_values(model):
        for i, prompt in enumerate(prompts):
            ids = _generated(model, prompt, eos_id, pad_id, room[i])
            stopped = eos_id in ids
            yield Reply(i, ids[: ids.index(eos_id)] if stopped else ids, stopped)
        return
    yield from (Reply(i, [], False) for i, most in enumerate(room) if most < 1)
    able = [i for i, most in enumerate(room) if most >= 1]
    for part in _batches([len(prompts[i]) for i in able], batch_size, max_new_tokens):
        chosen = [able[i] for i in part]
        yield from _batch(model, chosen, [prompts[i] for i in chosen], eos_id, pad_id, [room[i] for i in chosen])


def _room(model: Any, prompt: list[int], most: int) -> int:
    positions = positions_of(model.config)
    return min(most, positions - len(prompt)) if positions else most


def _keeps_keys_and_values(model: Any) -> bool:
    """Whether what a model keeps of a prompt is keys and values alone, those of one row whatever the others are."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if isinstance(v, dict))}
    if kinds & {"dynamic", "longrope"} or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _generated(model: Any, prompt: list[int], eos_id: int, pad_id: int, most: int) -> list[int]:
    """What transformers' own greedy decoding answers, EOS included."""
    import torch
    from transformers import GenerationConfig

    if most < 1:
        return []
    given = torch.tensor([prompt], device=model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=eos_id, pad_token_id=pad_id)
    with torch.inference_mode():
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
    return found[0, len(prompt) :].tolist()


def _batches(lengths: Sequence[int], batch_size: int, most: int) -> Iterator[list[int]]:
    """The numbers of all prompts, those of like length together, as many as may be held at once."""
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chosen and (len(chosen) == batch_size or (len(chosen) + 1) * (lengths[i] + most) > HELD_AT_ONCE):
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def generate_stream(model: Any, prompt: list[int], *, eos_id: int, max_new_tokens: int) -> Iterator[int]:
    """The ids of one reply as they come, without EOS."""
    most = _room(model, prompt, max_new_tokens)
    if not _keeps_keys_and_values(model):  # all at once, at the end
        yield from (token for token in _generated(model, prompt, eos_id, eos_id, most) if token != eos_id)
        return
    for step in _steps(model, [prompt], eos_id, most):
        if step.tokens[0] == eos_id:
            return
        yield step.tokens[0]


def _batch(
    model: Any, chosen: list[int], prompts: list[list[int]], eos_id: int, pad_id: int, room: list[int]
) -> Iterator[Reply]:
    said: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, pad_id, max(room)):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token == eos_id:
                step.end(row)
                yield Reply(chosen[row], said[row], True)
            else:
                said[row].append(token)
                if len(said[row]) == room[row]:
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

    takes = inspect.signature(model.forward).parameters
    mask = pad_left(prompts, pad_id)["attention_mask"].to(model.device)
    positions = mask.sum(1, keepdim=True) - 1
    rows = list(range(len(prompts)))
    with torch.inference_mode():
        logits, cache = _read(model, prompts, pad_id)
        chosen = logits.argmax(-1)
    for _ in range(most):
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
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        with torch.inference_mode(), attending(model, DECODING):
            logits = model(
                input_ids=chosen[:, None],
                attention_mask=None if mask.all() else mask,
                past_key_values=cache,
                use_cache=True,
                **({"position_ids": positions} if "position_ids" in takes else {}),
            ).logits[:, -1]
        chosen = logits.argmax(-1)


def _read(model: Any, prompts: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    """The logits after each prompt, [rows, vocabulary], and the keys and values of all, aligned on the right."""
    import torch

    from minisft.model.packed_attention import supports_padding_free

    if not supports_padding_free(model):
        return _read_padded(model, prompts, pad_id)
    longest = max(map(len, prompts))
    cache = _cache(model)
    hosts, place = _hosts(prompts)
    logits: list[Any] = [None] * len(prompts)
    for part in portions([len(host) for host in hosts], READ_AT_ONCE):
        begins = itertools.accumulate(map(len, hosts[part]), initial=0)
        begin_of = dict(zip(range(part.start, part.stop), begins, strict=False))
        ends = {row: begin_of[host] + len(prompts[row]) for row, host in enumerate(place) if host in begin_of}
        found, read = _read_end_to_end(model, hosts[part], list(ends.values()))
        for row, value in zip(ends, found, strict=True):
            logits[row] = value
        for layer, (keys, values) in zip(cache.layers, read, strict=True):
            for row, end in ends.items():
                own = slice(end - len(prompts[row]), end)
                layer.put(row, keys[:, own], values[:, own], len(prompts), longest)
    return torch.stack(logits), cache


def _hosts(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts that have to be read, and of each prompt the number of the one that begins with it.

    The questions of one conversation begin with one another, and what is read of a beginning does not depend on what
    comes after it.
    """
    hosts: list[list[int]] = []
    place = [0] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        prompt = prompts[i]
        found = next((n for n, host in enumerate(hosts) if host[: len(prompt)] == prompt), None)
        if found is None:
            found = len(hosts)
            hosts.append(prompt)
        place[i] = found
    return hosts, place


def _read_end_to_end(model: Any, prompts: list[list[int]], ends: list[int]) -> tuple[Any, list[tuple[Any, Any]]]:
    """The logits at `ends`, which count through all prompts, and of each layer keys and values of all tokens."""
    import torch
    from transformers.cache_utils import DynamicCache

    from minisft.model.packed_attention import PER_DOCUMENT

    batch = PaddingFree()([{"input_ids": prompt, "labels": prompt} for prompt in prompts])
    del batch["labels"]
    batch = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
    cache = DynamicCache(config=model.config)
    with attending(model, PER_DOCUMENT):
        last = torch.tensor(ends, device=model.device) - 1
        logits = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=last).logits[0]
    return logits, [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _read_padded(model: Any, prompts: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    takes = inspect.signature(model.forward).parameters
    batch = {name: tensor.to(model.device) for name, tensor in pad_left(prompts, pad_id).items()}
    given = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0), "logits_to_keep": 1}
    cache = _cache(model)
    given = {name: value for name, value in given.items() if name in takes}
    return model(**batch, **given, past_key_values=cache, use_cache=True).logits[:, -1], cache


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

        def put(self, row: int, keys: Any, values: Any, rows: int, longest: int) -> None:
            """Give one of `rows` its prompt's keys and values, [heads, tokens, head size], aligned on the right."""
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                shape = (rows, len(keys), longest + ROOM)  # zeros: what is masked must still be a number
                self.room = tuple(part.new_zeros((*shape, part.shape[-1])) for part in (keys, values))
                self.keys, self.values = (place[..., :longest, :] for place in self.room)
            for place, part in ((self.keys, keys), (self.values, values)):
                place[row, :, longest - part.shape[1] :] = part

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self.room = None

        @staticmethod
        def _larger(like: Any, length: int) -> Any:
            return torch.empty((*like.shape[:2], length, like.shape[-1]), dtype=like.dtype, device=like.device)

    return RoomyLayer


@contextmanager
def attending(model: Any, how: str) -> Iterator[None]:
    """Let `model` attend in another way, where it takes its attention from transformers' interface."""
    before = model.config.get_text_config()._attn_implementation
    if how == DECODING:
        if before != "sdpa" or not getattr(model, "_supports_attention_backend", False):
            yield
            return
        _register()
    model.set_attn_implementation(how)
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
        return out.reshape(rows, 1, heads, value.shape[-1]), None

    AttentionInterface.register(DECODING, decoding_attention)
    AttentionMaskInterface.register(DECODING, sdpa_mask)
