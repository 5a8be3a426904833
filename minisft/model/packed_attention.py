"""Attention for padding-free batches: rows are concatenated, and each attends only to itself.

It is registered with transformers' attention interface, so the model's code is unchanged.
"""

from __future__ import annotations

import itertools
from typing import Any

from minisft.errors import UserError

PER_DOCUMENT = "minisft_per_document"


def supports_padding_free(model: Any) -> bool:
    """Return whether this model uses the attention interface and can compute logits at chosen
    positions only.

    Also registers the attention if so. False for models with a sliding window or several kinds of
    layers: row boundaries alone do not describe their masks.
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
    AttentionMaskInterface.register(PER_DOCUMENT, lambda *args, **kwargs: None)  # row bounds replace the mask


def per_document_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Any = None,
    max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal scaled-dot-product attention within each row of a padding-free batch.

    `query` is [1, heads, tokens, head size], `key` and `value` the same with as many or fewer
    heads; `cu_seq_lens_q`, int32 [rows + 1], holds the rows' bounds and `max_length_q` the length
    of the longest row. Returns ([1, tokens, heads, head size], None). On CUDA in bf16 or fp16
    without dropout, one variable-length kernel computes all rows (`torch.nn.attention.varlen`,
    FlashAttention); otherwise each row is a separate call. Raises `UserError` for a sliding window
    or a softcap.
    """
    import torch

    if kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise UserError("this model's attention has a sliding window or a softcap: train it with --batching padded")
    dropout = dropout if module.training else 0.0
    grouped = query.shape[1] != key.shape[1]
    device = query.device.type
    if torch.is_autocast_enabled(device):  # it leaves query and key in fp32 after the rotary embedding, value in half
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    dtype = query.dtype
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head size]
        output: Any = varlen_attn(
            q,
            k,
            v,
            *(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),  # of the queries and of the keys
            scale=scaling,
            window_size=(-1, 0),  # causal
            enable_gqa=grouped,
        )
        return output[None], None

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
