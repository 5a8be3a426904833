"""What becomes of small updates in bf16 weights: the experiment behind "fp32 masters always".

A bf16 number has 8 significant bits, so near 0.05 the next number is 0.0002 away. Adam's first updates are about as
large as the learning rate, and an update below half that distance rounds back to the old weight.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moved:
    """`share` of the weights that had a gradient and now differ; the `losses` of the steps that should move them."""

    share: float
    losses: list[float]


def move(model: Any, batch: dict[str, Any], dtype: Any, learning_rate: float = 8e-6, steps: int = 3) -> Moved:
    """Train a copy of `model` on one padded batch with its weights, gradients and Adam's states in `dtype`.

    The products are bf16 in either case, so only the weights' own precision differs. `batch` is what
    `minisft.batches.PadRight` returns.
    """
    import torch

    from minisft.wide_products import needs_wide_products, widen_linear_layers

    copy = deepcopy(model).to(dtype).train()
    if needs_wide_products("cpu"):
        widen_linear_layers(copy)
    optimizer = torch.optim.AdamW(copy.parameters(), lr=learning_rate, weight_decay=0.0)
    before = [p.detach().clone() for p in copy.parameters()]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = copy(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    touched = moved = 0
    for parameter, start in zip(copy.parameters(), before, strict=True):
        has_gradient = parameter.grad != 0
        touched += int(has_gradient.sum())
        moved += int(((parameter != start) & has_gradient).sum())
    return Moved(moved / touched, losses)


def distance_to_next(value: float) -> float:
    """How far the next larger bf16 number is from the one nearest to `value`, which must be positive."""
    import torch

    here = torch.tensor(value, dtype=torch.bfloat16)
    return (torch.nextafter(here, torch.tensor(float("inf"), dtype=torch.bfloat16)) - here).item()
