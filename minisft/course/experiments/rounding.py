"""Measure the updates that bf16 weights lose to rounding: why masters are always fp32.

A bf16 number has 8 significant bits, so near 0.05 the next number is 0.0002 away. Adam's first
updates are about as large as the learning rate, and an update below half that distance rounds back
to the old weight.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moved:
    """`share`: of the weights with a gradient, the fraction that changed; `losses`: one per step,
    in nats.
    """

    share: float
    losses: list[float]


def move(model: Any, batch: dict[str, Any], dtype: Any, learning_rate: float = 8e-6, steps: int = 3) -> Moved:
    """Train a copy of `model` on one padded batch, storing weights, gradients and Adam's states in
    `dtype`.

    Forward and backward run in fp32 on the stored weights, so only the storage differs between
    dtypes. `batch` is what `minisft.training.collators.PadRight` returns.
    """
    import torch

    copy = deepcopy(model).train()
    stored = [torch.nn.Parameter(p.detach().to(dtype)) for p in copy.parameters()]
    before = [p.detach().clone() for p in stored]
    optimizer = torch.optim.AdamW(stored, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        copy.zero_grad()
        for parameter, weight in zip(copy.parameters(), stored, strict=True):
            parameter.data.copy_(weight.data)
        loss = copy(**batch, use_cache=False).loss
        loss.backward()
        for parameter, weight in zip(copy.parameters(), stored, strict=True):
            weight.grad = parameter.grad.to(dtype)
        optimizer.step()
        losses.append(loss.item())
    touched = moved = 0
    for weight, start in zip(stored, before, strict=True):
        # The gradient is the last step's: a weight without one cannot be expected to move.
        assert weight.grad is not None  # set in every step above
        has_gradient = weight.grad != 0
        touched += int(has_gradient.sum())
        moved += int(((weight != start) & has_gradient).sum())
    return Moved(moved / touched, losses)


def distance_to_next(value: float) -> float:
    """Return the gap between the bf16 number nearest to `value` (positive) and the next larger one."""
    import torch

    nearest = torch.tensor(value, dtype=torch.bfloat16)
    return (torch.nextafter(nearest, torch.tensor(float("inf"), dtype=torch.bfloat16)) - nearest).item()
