"""The loss of supervised fine-tuning, at the trained positions alone and without ever holding the full logits.

Logits are what a small model with a large vocabulary spends its memory on: 8 rows of 512 tokens and 49,152 entries
are 0.8 GB in fp32, and as much again for their gradient. Here the output layer takes the trained positions a chunk
at a time, and each chunk's gradients are made while its logits are at hand, so that nothing of it is kept.
The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch

from minisft.labels.encode_row import IGNORE_INDEX
from minisft.model.configs import with_layers

CHUNK_BYTES = 32 * 1024 * 1024  # of fp32 logits at a time: large enough for matrix products to be fast


class LossHead:
    """Stands in for the forward pass of a model's output layer: with targets at hand it returns their loss.

    The layer remains the module it was, with its parameters and whatever hooks DDP or ZeRO hang on it; at ZeRO
    stage 3 those gather its weight around this very call. Without targets it returns logits as before.
    """

    def __init__(self, layer: torch.nn.Linear):
        self.layer, self.wanted = layer, None
        self.most_chunks: int | None = None  # for those who count bytes and need no loss: one chunk is like another
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered for each call
        layer.forward = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.around():
            if self.wanted is None:
                return torch.nn.functional.linear(hidden, self.layer.weight, self.layer.bias)
            positions, targets = self.wanted
            chosen = hidden.flatten(0, -2)[positions]
            options = {"most_chunks": self.most_chunks}
            return linear_cross_entropy(chosen, self.layer.weight, targets, self.layer.bias, **options)

    def loss(self, model: Any, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of -log p of `targets`, int64 [n], at `positions`, int64 [n], which count through the whole batch."""
        self.wanted = positions, targets
        try:
            return model(**inputs).logits
        finally:
            self.wanted = None


def summed_loss(
    model: Any,
    inputs: dict[str, Any],
    positions: torch.Tensor,
    targets: torch.Tensor,
    head: LossHead | None,
    padding_free: bool,
) -> torch.Tensor:
    """The sum of the loss over the trained tokens of one micro-batch, a scalar in fp32.

    `positions` and `targets` are those of `trained_positions`. Without a `head` the model makes the logits itself: at
    the trained positions alone where the batch is `padding_free`, else at all of them.
    """
    if head is not None:
        return head.loss(model, inputs, positions, targets)
    if padding_free:
        logits = model(**inputs, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs).logits.flatten(0, -2)[positions]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def trained_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a model predicts a trained token, and which: (positions, targets), int64 [n] each.

    `labels` is [rows, tokens]; positions count through all rows. The token at `i` is predicted at `i - 1`.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (shifted != IGNORE_INDEX).nonzero()[:, 0]
    return positions, shifted[positions]


def supports_loss_head(config: Any, trust_remote_code: bool = False) -> bool:
    """Whether the logits of a model of this `config` are its output layer's very output, not scaled or capped after.

    Found out by running a model without weights (on PyTorch's meta device) and with few layers, which have no
    part in it.
    """
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", None)
    few = with_layers(config, min(layers, 2)) if isinstance(layers, int) else deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(few, attn_implementation="eager", trust_remote_code=trust_remote_code)
        layer = model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            return False
        mark = torch.empty(1, 1, 1)
        layer.forward = lambda hidden: mark
        ids = torch.ones(1, 2, dtype=torch.int64)
        try:
            return model(ids, attention_mask=ids, use_cache=False).logits is mark
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            return False


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    most_chunks: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")`, with at most `chunk_bytes` of logits alive.

    `hidden` is [n, size], `weight` [vocabulary, size], `targets` int64 [n]. Products run in the dtype of autocast or
    of `hidden`; softmax, sum and the weight's gradient in fp32 or wider. Returns a scalar. With `most_chunks` only the
    first chunks are computed: used by the memory trace, which needs the shape of one chunk only.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype, chunk_bytes, most_chunks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
        chunk_bytes: int,
        most_chunks: int | None,
    ) -> torch.Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=exact, device=h.device)
            needs = ctx.needs_input_grad
            d_hidden = torch.empty_like(h) if needs[0] else None
            d_weight = torch.zeros(w.shape, dtype=exact, device=h.device) if needs[1] else None
            d_bias = torch.zeros(bias.shape, dtype=exact, device=h.device) if needs[2] else None
            rows = max(1, chunk_bytes // (len(w) * exact.itemsize))
            for a in range(0, len(h), rows)[:most_chunks]:
                part = slice(a, a + rows)
                wanted = targets[part, None]
                logits = h[part] @ w.T
                if bias is not None:
                    logits += bias.to(dtype)
                logits = logits.to(exact)
                normalizer = logits.logsumexp(dim=1, keepdim=True)
                total += (normalizer - logits.gather(1, wanted)).sum()
                if not any(needs):
                    continue
                slope = logits.sub_(normalizer).exp_()  # the softmax, less one at the target: d loss / d logits
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1))
                if d_bias is not None:
                    d_bias += slope.sum(dim=0)
                slope = slope.to(dtype)
                if d_hidden is not None:
                    torch.mm(slope, w, out=d_hidden[part])
                if d_weight is not None:
                    if dtype == exact:
                        d_weight.addmm_(slope.T, h[part])
                    else:
                        d_weight += slope.T @ h[part]
        ctx.gradients = [d_hidden, d_weight, d_bias]
        ctx.dtypes = [t if t is None else t.dtype for t in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [
            None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None  # they have been scaled in place: a second backward must fail, not be wrong
        return *found, None, None, None, None
