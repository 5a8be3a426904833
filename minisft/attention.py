"""Attention for padding-free batches: rows laid end to end, each attending to itself alone.

Registered with transformers' attention interface, so the model's own code stays as it is.
"""

from __future__ import annotations

import itertools
from typing import Any

PER_DOCUMENT = "minisft_per_document"


def supports_padding_free(model: Any) -> bool:
    """Whether this model takes its attention from the interface and makes logits at chosen positions only."""
    import inspect

    backend = getattr(model, "_supports_attention_backend", False)
    if backend and "logits_to_keep" in inspect.signature(model.forward).parameters:
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
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal scaled-dot-product attention within each row of a padding-free batch.

    `query` is [1, heads, tokens, head size], `key` and `value` the same with as many or fewer heads;
    `cu_seq_lens_q` holds the rows' bounds. Returns [1, tokens, heads, head size].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    bounds = cu_seq_lens_q.tolist()
    rows = [
        scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout if module.training else 0.0,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None
