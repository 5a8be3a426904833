"""Attention for padding-free batches: rows laid end to end, each attending to itself alone.

Registered with transformers' attention interface, so the model's own code stays as it is.
"""

from __future__ import annotations

import itertools
from typing import Any

from minisft.errors import UserError

PER_DOCUMENT = "minisft_per_document"


def supports_padding_free(model: Any) -> bool:
    """Whether this model takes its attention from the interface and makes logits at chosen positions only.

    Models with a sliding window, or with another attention per layer, do not count: their masks are more than bounds.
    """
    import inspect

    config = model.config.get_text_config()
    plain = not getattr(config, "sliding_window", None) and len(set(getattr(config, "layer_types", None) or ())) <= 1
    backend = getattr(model, "_supports_attention_backend", False)
    if plain and backend and "logits_to_keep" in inspect.signature(model.forward).parameters:
        _register()
        return True
    return False


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PER_DOCUMENT, per_document_attention)
    AttentionMaskInterface.register(PER_DOCUMENT, lambda *args, **kwargs: None)  # rows need no mask, only bounds


def per_document_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal scaled-dot-product attention within each row of a padding-free batch.

    `query` is [1, heads, tokens, head size], `key` and `value` the same with as many or fewer heads;
    `cu_seq_lens_q`, int32 [rows + 1], holds the rows' bounds and `max_length_q` the longest row. Returns
    [1, tokens, heads, head size]. On CUDA in bf16 or fp16 one variable-length kernel takes all rows
    (`torch.nn.attention.varlen`, FlashAttention); elsewhere each row is a call of its own.
    """
    import torch

    if kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise UserError("this model's attention has a window or a cap: train it with --batching padded")
    dropout = dropout if module.training else 0.0
    grouped = query.shape[1] != key.shape[1]
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings come out of it in fp32, values in half
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    dtype = query.dtype
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head size]
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)[None], None

    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for a, b in itertools.pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).to(dtype).contiguous(), None
