"""Compute the fine-tuning loss at the trained positions only, without ever holding the full logits.

Logits dominate the memory of a small model with a large vocabulary: for 8 rows of 512 tokens and
49,152 entries they take 0.8 GB in fp32, and their gradient as much again. Here the output layer
processes the trained positions in chunks, and computes each chunk's gradients while its logits are
in memory, so no logits are kept for the backward pass. The idea is Liger Kernel's fused linear
cross-entropy (Hsu et al. 2024, arXiv:2410.10989), here in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch

from minisft.labels.encode_row import IGNORE_INDEX
from minisft.model.configs import with_layers

CHUNK_BYTES = 32 * 1024 * 1024  # of fp32 logits per chunk; large enough for fast matrix products


class LossHead:
    """Replace the forward function of a model's output layer: with targets set, it returns their
    loss.

    The layer stays the same module, with its parameters and the hooks of DDP or ZeRO; at ZeRO stage
    3 these hooks gather its weight around this call. Without targets it returns logits as before.
    """

    def __init__(self, layer: torch.nn.Linear):
        self.layer = layer
        self.wanted: tuple[torch.Tensor, torch.Tensor] | None = None  # positions and targets, during `loss`
        self.most_chunks: int | None = None  # set by the memory trace, which needs the shape of one chunk only
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered for each call
        replaced: Any = layer
        replaced.forward = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.around():
            if self.wanted is None:
                return torch.nn.functional.linear(hidden, self.layer.weight, self.layer.bias)
            positions, targets = self.wanted
            chosen = hidden.flatten(0, -2)[positions]
            weight, bias = self.layer.weight, self.layer.bias
            return linear_cross_entropy(chosen, weight, targets, bias, most_chunks=self.most_chunks)

    def loss(self, model: Any, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of -log p of `targets`, int64 [n], at `positions`, int64 [n], of the
        flattened batch.
        """
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

    `positions` and `targets` are those of `trained_positions`. Without a `head` the model makes the
    logits itself: at the trained positions alone where the batch is `padding_free`, else at all of
    them.
    """
    if head is not None:
        return head.loss(model, inputs, positions, targets)
    if padding_free:
        logits = model(**inputs, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs).logits.flatten(0, -2)[positions]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def trained_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that predict a trained token and those tokens: (positions, targets),
    int64 [n] each.

    `labels` is [rows, tokens]; positions index the flattened batch. The token at `i` is predicted
    at `i - 1`.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (shifted != IGNORE_INDEX).nonzero()[:, 0]
    return positions, shifted[positions]


def supports_loss_head(config: Any, trust_remote_code: bool = False) -> bool:
    """Return whether a model of this `config` returns its output layer's result unchanged, not
    scaled or capped.

    Tested by running a model without weights (on PyTorch's meta device) and with at most two
    layers, since the decoder layers do not matter here.
    """
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", None)
    shallow = with_layers(config, min(layers, 2)) if isinstance(layers, int) else deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shallow, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        layer = model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            return False
        marker = torch.empty(1, 1, 1)
        replaced: Any = layer
        replaced.forward = lambda hidden: marker
        ids = torch.ones(1, 2, dtype=torch.int64)
        try:
            return model(ids, attention_mask=ids, use_cache=False).logits is marker
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
    """`cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")`, with at most
    `chunk_bytes` of logits in memory.

    `hidden` is [n, size], `weight` [vocabulary, size], `targets` int64 [n]. Products run in the
    dtype of autocast, or of `hidden` without autocast; softmax, sum and the weight's gradient in
    fp32 or wider. Returns a scalar. With `most_chunks` only the first chunks are computed, which is
    used by the memory trace, which needs the shape of one chunk only.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype, chunk_bytes, most_chunks)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients during the forward pass; the backward pass only scales them."""

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
            d_bias = torch.zeros(bias.shape, dtype=exact, device=h.device) if bias is not None and needs[2] else None
            rows = max(1, chunk_bytes // (len(w) * exact.itemsize))
            for start in range(0, len(h), rows)[:most_chunks]:
                part = slice(start, start + rows)
                target_ids = targets[part, None]
                logits = h[part] @ w.T
                if bias is not None:
                    logits += bias.to(dtype)
                logits = logits.to(exact)
                normalizer = logits.logsumexp(dim=1, keepdim=True)
                total += (normalizer - logits.gather(1, target_ids)).sum()
                if not any(needs):
                    continue
                slope = logits.sub_(normalizer).exp_()  # d loss / d logits: the softmax, minus 1 at the target
                slope.scatter_add_(1, target_ids, slope.new_full(target_ids.shape, -1))
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
        gradients = [
            None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None  # scaled in place, so a second backward must fail rather than be wrong
        return *gradients, None, None, None, None
