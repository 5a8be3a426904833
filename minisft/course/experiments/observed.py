"""Watch one step of a ZeRO function: what AdamW receives, what stays alive, what is sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisft.course.experiments.by_hand import Layer, Model

OPERATIONS = {  # PyTorch's names for them
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "broadcast_": "broadcast",
}


class Observed(TorchDispatchMode):
    """Counts the collective operations made while it is active; `model` and `adamw` report to it."""

    def __init__(self, model: Model, weights: Sequence[Tensor], adamw: Callable[..., None]):
        super().__init__()
        self.sent: Counter[str] = Counter()  # elements, by the whole tensor of each operation
        self.calls: Counter[str] = Counter()
        self.whole, self.gradients = Alive(), Alive()  # layers gathered whole; gradients of layers
        self.model = _ObservedModel(model, self)
        self._weights, self._adamw = weights, adamw
        self._got: list[tuple[int, Tensor, Tensor]] = []  # which of the weights, their gradient, and a copy of it
        self._large = Alive()  # tensors as large as all weights, made in this step
        self._unsent = 0  # elements of gradients that were alive when AdamW was called first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := OPERATIONS.get(func._schema.name.partition("::")[2])):
            self.calls[name] += 1
            self.sent[name] += max(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.model.size and not self._is_weight(leaf):
                self._large.add(leaf)
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        pointer = tensor.untyped_storage().data_ptr()
        return any(part.untyped_storage().data_ptr() == pointer for part in self._weights)

    def adamw(self, weights: Tensor, gradient: Tensor, averages: dict[str, Tensor], step: int) -> None:
        """Do a step of AdamW, and note what it was given."""
        places = [part.untyped_storage().data_ptr() for part in self._weights]
        pointer = weights.untyped_storage().data_ptr()
        place = places.index(pointer) if pointer in places else len(self._got)
        self._unsent = self._unsent if self._got else max(self.gradients.elements, self._large.elements)
        self._got.append((place, gradient, gradient.detach().clone()))
        self._adamw(weights, gradient, averages, step)

    def report(self, state: Any) -> dict[str, Any]:
        """Return what was seen, as plain values; bytes are of fp32."""
        kept = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage() for _, gradient, _ in self._got}
        averages = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        return {
            "gradient": [copy.tolist() for _, _, copy in sorted(self._got, key=lambda entry: entry[0])],
            "calls": dict(self.calls),
            "sent": {name: 4 * elements for name, elements in self.sent.items()},
            "whole layers": max(self.whole.most, 1),
            "bytes": {
                "weights": sum(part.untyped_storage().nbytes() for part in self._weights),
                "gradients": max(4 * self._unsent, sum(storage.nbytes() for storage in kept.values())),
                "averages": sum(tensor.untyped_storage().nbytes() for tensor in averages),
            },
        }


class Alive:
    """Counts tensors whose storage is still held by somebody."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}  # elements by storage
        self.most = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = tensor.numel()
            weakref.finalize(storage, self._storages.pop, storage._cdata, None)
        self.most = max(self.most, len(self._storages))

    @property
    def elements(self) -> int:
        return sum(self._storages.values())


class _ObservedModel(Model):
    """The model that a function gets: its gradients and its gathered layers are counted."""

    def __init__(self, model: Model, observed: Observed):
        super().__init__([_ObservedLayer(layer.size, layer.function, observed) for layer in model.layers])
        self._real, self._observed = model, observed

    def backward(self, weights: Tensor) -> Iterator[tuple[int, Tensor]]:
        for first, gradient in self._real.backward(weights):
            self._observed.gradients.add(gradient)
            yield first, gradient
            del gradient


class _ObservedLayer(Layer):
    def __init__(self, size: int, function: Callable[..., Tensor], observed: Observed):
        super().__init__(size, function)
        self.observed = observed

    def forward(self, weights: Tensor, x: Tensor | None) -> Tensor:
        self.observed.whole.add(weights)
        return super().forward(weights, x)

    def backward(self, weights: Tensor, x: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.observed.whole.add(weights)
        gradient, below = super().backward(weights, x, down)
        self.observed.gradients.add(gradient)
        return gradient, below
