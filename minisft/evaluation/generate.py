"""Decode prompts greedily in batches, with the same output as one at a time.

Prompts of similar length form a batch. They are read concatenated, without padding; then each step
generates one token per row. A finished row leaves its batch, so no more computation is spent on it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minisft.evaluation.growing_cache import growing_cache
from minisft.model.configs import positions_of
from minisft.training.collators import PaddingFree, pad_left, portions

DECODING = "minisft_decoding"
READ_AT_ONCE = 4096  # prompt tokens per forward pass
HELD_AT_ONCE = 32_768  # tokens per batch, with padding and answers; their keys and values fill the memory


@dataclass(frozen=True)
class Reply:
    """The generated ids for prompt number `index`, without the stop token; `stopped` if one ended it."""

    index: int
    ids: list[int]
    stopped: bool


def generate_batched(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[Reply]:
    """Generate at most `max_new_tokens` tokens after each of `prompts` by greedy decoding.

    Any of `stop_ids` ends a reply. Yields each prompt's reply once, as soon as it is complete.
    Penalties and sampling settings of a `generation_config` are ignored. An answer ends at the
    model's last position. Models whose cache is not plain keys and values, or whose positions
    depend on the longest row, answer one prompt at a time with transformers' own `generate`.
    """
    limits = [_token_limit(model, prompt, max_new_tokens) for prompt in prompts]
    if not _supports_batches(model):
        for i, prompt in enumerate(prompts):
            ids = _generated(model, prompt, stop_ids, pad_id, limits[i])
            kept = before_stop(ids, stop_ids)
            yield Reply(i, kept, len(kept) < len(ids))
        return
    yield from (Reply(i, [], False) for i, limit in enumerate(limits) if limit < 1)
    answerable = [i for i, limit in enumerate(limits) if limit >= 1]
    for batch in _batches([len(prompts[i]) for i in answerable], batch_size, max_new_tokens):
        indices = [answerable[i] for i in batch]
        yield from _batch(model, indices, [prompts[i] for i in indices], stop_ids, pad_id, [limits[i] for i in indices])


def before_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first of `stop_ids`; all if none of them occurs."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, ids))


def _token_limit(model: Any, prompt: list[int], max_new_tokens: int) -> int:
    """The most tokens to generate; below 1 if the prompt fills the model's positions."""
    positions = positions_of(model.config)
    return min(max_new_tokens, positions - len(prompt)) if positions else max_new_tokens


def _supports_batches(model: Any) -> bool:
    """Whether the cache is plain keys and values that do not depend on the batch's other rows."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if isinstance(v, dict))}
    if kinds & {"dynamic", "longrope"} or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _generated(model: Any, prompt: list[int], stop_ids: Sequence[int], pad_id: int, limit: int) -> list[int]:
    """Return the ids from transformers' own greedy decoding, including the stop token."""
    import torch
    from transformers import GenerationConfig

    if limit < 1:
        return []
    input_ids = torch.tensor([prompt], device=model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=list(stop_ids), pad_token_id=pad_id)
    with torch.inference_mode():
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=greedy)
    return output[0, len(prompt) :].tolist()


def _batches(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Group the prompts' indices by similar length, within `batch_size` and `HELD_AT_ONCE`."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (lengths[i] + max_new_tokens) > HELD_AT_ONCE):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def generate_stream(model: Any, prompt: list[int], *, stop_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
    """Yield the ids of one greedy reply as they are generated, up to one of `stop_ids`."""
    limit = _token_limit(model, prompt, max_new_tokens)
    if not _supports_batches(model):  # nothing can be shown before the end
        yield from before_stop(_generated(model, prompt, stop_ids, stop_ids[0], limit), stop_ids)
        return
    for step in _steps(model, [prompt], stop_ids[0], limit):
        if step.tokens[0] in stop_ids:
            return
        yield step.tokens[0]


def _batch(
    model: Any, indices: list[int], prompts: list[list[int]], stop_ids: Sequence[int], pad_id: int, limits: list[int]
) -> Iterator[Reply]:
    """Answer one batch; `indices` and `limits` (tokens) belong to `prompts`."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, pad_id, max(limits)):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token in stop_ids:
                step.end(row)
                yield Reply(indices[row], replies[row], True)
            else:
                replies[row].append(token)
                if len(replies[row]) == limits[row]:
                    step.end(row)
                    yield Reply(indices[row], replies[row], False)


@dataclass
class _Step:
    """One new token for each unfinished row; `end` removes a row before the next step."""

    rows: list[int]
    tokens: list[int]
    ended: set[int]

    def end(self, row: int) -> None:
        """Mark `row` as finished."""
        self.ended.add(row)


def _steps(model: Any, prompts: list[list[int]], pad_id: int, limit: int) -> Iterator[_Step]:
    """Read the prompts, then yield at most `limit` steps.

    The caller ends rows of a step before it takes the next one.
    """
    import torch

    parameters = inspect.signature(model.forward).parameters
    mask = pad_left(prompts, pad_id)["attention_mask"].to(model.device)
    positions = mask.sum(1, keepdim=True) - 1
    rows = list(range(len(prompts)))
    with torch.inference_mode():
        logits, cache = _read(model, prompts, pad_id)
        tokens = logits.argmax(-1)
    for _ in range(limit):
        step = _Step(rows, tokens.tolist(), set())
        yield step
        if step.ended:
            unfinished = [i for i, row in enumerate(rows) if row not in step.ended]
            if not unfinished:
                return
            rows = [rows[i] for i in unfinished]
            selection = torch.tensor(unfinished, device=mask.device)
            tokens, mask, positions = tokens[selection], mask[selection], positions[selection]
            cache.batch_select_indices(selection)
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        with torch.inference_mode(), attending(model, DECODING):
            logits = model(
                input_ids=tokens[:, None],
                attention_mask=None if mask.all() else mask,
                past_key_values=cache,
                use_cache=True,
                **({"position_ids": positions} if "position_ids" in parameters else {}),
            ).logits[:, -1]
        tokens = logits.argmax(-1)


def _read(model: Any, prompts: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    """Run all prompts.

    Returns (logits after each prompt, [rows, vocabulary]; cache, aligned on the right).
    """
    import torch

    from minisft.model.packed_attention import supports_padding_free

    if not supports_padding_free(model):
        return _read_padded(model, prompts, pad_id)
    longest = max(map(len, prompts))
    cache = growing_cache(model)
    hosts, host_of = _hosts(prompts)
    logits: list[Any] = [None] * len(prompts)
    for portion in portions([len(host) for host in hosts], READ_AT_ONCE):
        starts = itertools.accumulate(map(len, hosts[portion]), initial=0)
        start_of = dict(zip(range(portion.start, portion.stop), starts, strict=False))
        # Where each prompt of this portion ends in the concatenated hosts.
        ends = {row: start_of[host] + len(prompts[row]) for row, host in enumerate(host_of) if host in start_of}
        last_logits, layers = _read_concatenated(model, hosts[portion], list(ends.values()))
        for row, row_logits in zip(ends, last_logits, strict=True):
            logits[row] = row_logits
        for layer, (keys, values) in zip(cache.layers, layers, strict=True):
            for row, end in ends.items():
                own = slice(end - len(prompts[row]), end)
                layer.put(row, keys[:, own], values[:, own], len(prompts), longest)
    return torch.stack(logits), cache


def _hosts(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Return the prompts to compute, and for each prompt the index among them of one that begins
    with it.

    Questions of one conversation share prefixes, and in a causal model the keys and values of a
    prefix do not depend on what follows, so each prefix is computed once.
    """
    hosts: list[list[int]] = []
    host_of = [0] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        prompt = prompts[i]
        host_index = next((n for n, host in enumerate(hosts) if host[: len(prompt)] == prompt), None)
        if host_index is None:
            host_index = len(hosts)
            hosts.append(prompt)
        host_of[i] = host_index
    return hosts, host_of


def _read_concatenated(model: Any, prompts: list[list[int]], ends: list[int]) -> tuple[Any, list[tuple[Any, Any]]]:
    """Run the concatenated prompts; returns (logits of the tokens before `ends`; keys and values of
    each layer).

    `ends` are positions in the concatenation.
    """
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
    layers: list[Any] = cache.layers
    return logits, [(layer.keys[0], layer.values[0]) for layer in layers]


def _read_padded(model: Any, prompts: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    """`_read` for a model that cannot take concatenated prompts."""
    parameters = inspect.signature(model.forward).parameters
    batch = {name: tensor.to(model.device) for name, tensor in pad_left(prompts, pad_id).items()}
    if "position_ids" in parameters:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in parameters:
        batch["logits_to_keep"] = 1
    cache = growing_cache(model)
    return model(**batch, past_key_values=cache, use_cache=True).logits[:, -1], cache


@contextmanager
def attending(model: Any, how: str) -> Iterator[None]:
    """Use the attention implementation `how` within the context, if the model supports it."""
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
        """Attention for one new token, without repeating keys and values for the query heads that
        share them.

        `query` is [rows, heads, 1, head size], `key` and `value` [rows, key heads, tokens, head
        size]. Query heads that share a key head become positions of one head, which gives the same
        sums.
        """
        import torch

        if query.shape[2] > 1 or kwargs.get("sliding_window") or kwargs.get("softcap"):
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        rows, heads, _, size = query.shape
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling")
        )
        return out.reshape(rows, 1, heads, value.shape[-1]), None

    AttentionInterface.register(DECODING, decoding_attention)
    AttentionMaskInterface.register(DECODING, sdpa_mask)
