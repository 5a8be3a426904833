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
    """Train a copy of `model` on one padded batch, its weights, gradients and Adam's states kept in `dtype`.

    All products are made in fp32, from the weights as they are kept, so nothing but the keeping differs. `batch` is
    what `minisft.training.collators.PadRight` returns.
    """
    import torch

    copy = deepcopy(model).train()
    kept = [torch.nn.Parameter(p.detach().to(dtype)) for p in copy.parameters()]
    before = [p.detach().clone() for p in kept]
    optimizer = torch.optim.AdamW(kept, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        copy.zero_grad()
        for parameter, weight in zip(copy.parameters(), kept, strict=True):
            parameter.data.copy_(weight.data)
        loss = copy(**batch, use_cache=False).loss
        loss.backward()
        for parameter, weight in zip(copy.parameters(), kept, strict=True):
            weight.grad = parameter.grad.to(dtype)
        optimizer.step()
        losses.append(loss.item())
    touched = moved = 0
    for weight, start in zip(kept, before, strict=True):
        has_gradient = weight.grad != 0
        touched += int(has_gradient.sum())
        moved += int(((weight != start) & has_gradient).sum())
    return Moved(moved / touched, losses)


def distance_to_next(value: float) -> float:
    """How far the next larger bf16 number is from the one nearest to `value`, which must be positive."""
    import torch

    here = torch.tensor(value, dtype=torch.bfloat16)
    return (torch.nextafter(here, torch.tensor(float("inf"), dtype=torch.bfloat16)) - here).item()
