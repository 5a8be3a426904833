"""A tiny language model in layers, AdamW by hand, and the tasks that ZeRO is written on (notebook 07).

The model predicts a character from the four before it. `Model` offers the gradients of one rank's
rows in three ways: whole (stage 1), layer by layer while backward runs (stage 2), and as layers
whose weights the caller provides (stage 3). Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

ALPHABET = " \nabcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-("
CONTEXT = 4  # characters that the model reads
RANKS = 2
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON = 1e-2, 1e-2, (0.9, 0.999), 1e-8


def character_model() -> nn.Sequential:
    """Return the model, with the same initial weights every time: logits of one character."""
    torch.manual_seed(0)
    width, hidden = 8, 32
    return nn.Sequential(
        nn.Sequential(nn.Embedding(len(ALPHABET), width), nn.Flatten()),
        nn.Sequential(nn.Linear(CONTEXT * width, hidden), nn.Tanh()),
        nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh()),
        nn.Linear(hidden, len(ALPHABET)),
    )


def character_rows(text: str) -> list[list[int]]:
    """Return one row per character of `text`: the ids of the four before it, and its own.

    Characters that the alphabet lacks are left out.
    """
    ids = [ALPHABET.index(character) for character in text.lower() if character in ALPHABET]
    return [ids[i : i + CONTEXT + 1] for i in range(len(ids) - CONTEXT)]


def adamw(weights: Tensor, gradient: Tensor, averages: dict[str, Tensor], step: int) -> None:
    """Do one step of AdamW in place, in the order of operations of `torch.optim.AdamW`.

    `averages` holds Adam's two averages of these weights; it is empty at first. `step` counts from 1.
    """
    if weights.shape != gradient.shape:
        raise ValueError(
            f"AdamW got {weights.numel()} weights and {gradient.numel()} gradients: is the padding missing?"
        )
    if step < 1:
        raise ValueError(
            f"AdamW got step {step}: the first step is 1, because the bias correction divides by 1 - beta^step"
        )
    if not averages:
        averages |= {"average": torch.zeros_like(weights), "square": torch.zeros_like(weights)}
    average, square = averages["average"], averages["square"]
    weights.mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
    average.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    step_size = LEARNING_RATE / (1 - BETAS[0] ** step)
    root = (square.sqrt() / math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
    weights.addcdiv_(average, root, value=-step_size)


class Layer:
    """One layer as a function of its flat weights [size] and of what the layer below returned."""

    def __init__(self, size: int, function: Callable[[Tensor, Tensor | None], Tensor]):
        self.size, self.function = size, function

    def forward(self, weights: Tensor, x: Tensor | None) -> Tensor:
        """Return the layer's output. `x` is the output of the layer below, None for the first."""
        self._require_whole(weights)
        with torch.no_grad():
            return self.function(weights, x)

    def backward(self, weights: Tensor, x: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the loss with respect to `weights` and to `x`.

        `down` is the gradient with respect to the layer's output, None for the last, which returns
        the loss.
        """
        self._require_whole(weights)
        inputs = [part.detach().requires_grad_() for part in (weights, x) if part is not None]
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self.function(inputs[0], inputs[1] if x is not None else None), inputs, down
            )
        return gradients[0], gradients[1] if x is not None else None

    def _require_whole(self, weights: Tensor) -> None:
        if weights.numel() != self.size:
            raise ValueError(
                f"this layer has {self.size} weights and got {weights.numel()}: gather them from all ranks, "
                "and cut off the padding"
            )


class Model:
    """The layers of a model together with one rank's rows of one step; the last returns the loss."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = list(layers)
        self.size = sum(layer.size for layer in layers)
        self.loss = torch.tensor(math.nan)  # of the last forward pass

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient of this rank's loss with respect to all weights: [size]."""
        parts = sorted(self.backward(weights), key=lambda part: part[0])
        return torch.cat([gradient for _, gradient in parts])

    def backward(self, weights: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first, gradient) of each layer, the last layer first, while backward runs.

        `first` is the place of the layer's first weight in `weights`: [at least size].
        """
        sizes = [layer.size for layer in self.layers]
        firsts = [0, *accumulate(sizes)]
        parts = [weights[first : first + size] for first, size in zip(firsts, sizes, strict=False)]
        inputs: list[Tensor | None] = [None]
        for layer, part in zip(self.layers, parts, strict=True):
            inputs.append(layer.forward(part, inputs[-1]))
        self.loss = inputs.pop()  # type: ignore[assignment]
        down = None
        for i in reversed(range(len(self.layers))):
            gradient, down = self.layers[i].backward(parts[i], inputs.pop(), down)
            yield firsts[i], gradient
            del gradient


def pytorch_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Return PyTorch's optimizer with the same settings as `adamw`."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPSILON)


@dataclass(frozen=True)
class Task:
    """What two ranks train, step by step: `data[step][rank]`.

    With `sizes`, the model is a sum of straight lines in layers of those sizes, and the data are the
    slopes, which are the gradient. Without, it is the character model, and the data are rows.
    `digits` rounds the results that are compared; -1 compares them bit for bit.
    """

    data: Any
    sizes: tuple[int, ...] = ()
    digits: int = -1

    @property
    def steps(self) -> int:
        return len(self.data)

    def start(self) -> Tensor:
        """Return the initial weights, flat: 1, 2, 3 and so on for straight lines."""
        if self.sizes:
            return torch.arange(1, sum(self.sizes) + 1, dtype=torch.float32)
        return flat(character_model())

    def model(self, step: int, rank: int) -> Model:
        """Return the model with the data of one step and rank."""
        data = self.data[step][rank]
        if self.sizes:
            return Model([Layer(len(s), partial(_line, s)) for s in torch.tensor(data).split(list(self.sizes))])
        rows, modules = torch.tensor(data), list(character_model())
        return Model([Layer(flat(m).numel(), partial(_character_layer, m, rows)) for m in modules])


def flat(module: nn.Module) -> Tensor:
    """Return all parameters of `module` in one new tensor, in their order."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def _line(slopes: Tensor, weights: Tensor, x: Tensor | None) -> Tensor:
    height = (slopes * weights).sum()
    return height if x is None else x + height


def _character_layer(module: nn.Module, rows: Tensor, weights: Tensor, x: Tensor | None) -> Tensor:
    """Compute one layer of the character model with `weights` in place of its own."""
    parameters = dict(module.named_parameters())
    parts = weights.split([parameter.numel() for parameter in parameters.values()])
    named = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
    y = functional_call(module, named, rows[:, :CONTEXT] if x is None else x)
    return cross_entropy(y, rows[:, CONTEXT]) if isinstance(module, nn.Linear) else y
