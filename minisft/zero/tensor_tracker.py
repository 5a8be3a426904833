"""Tracks tensors from allocation to release: the bytes alive at each moment, and their owners at the peak.

A dispatch mode sees each tensor that PyTorch makes, and a finalizer sees the release of its storage. Real tensors and
fake ones (`FakeTensorMode`, which computes shapes only) are counted the same way, to the byte. What a kernel allocates
and frees before it returns is not seen, nor what C++ allocates without PyTorch's dispatcher.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Moment:
    """Bytes alive after one allocation or release, by owner, and the phase in which it happened."""

    phase: str
    held: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, by the owner that is current when they are made.

    `held` is what is alive now; `peak` is the moment with the most; `timeline` is the total after each change, with
    its phase. Each storage counts once; views add nothing. If an owner becomes known only later (`name`), `summary`
    counts the tensor as its own from the allocation on.
    """

    def __init__(self, owner: str = "activations", phase: str = "forward"):
        super().__init__()
        self.owner, self.phase = owner, phase
        self.held: dict[str, int] = {}
        self.peak = Moment(phase, {})
        self._events: list[tuple[str, list[Any], int]] = []  # phase, entry of `_known`, 1 (allocated) or -1 (released)
        self._known: dict[int, list[Any]] = {}  # storage -> [owner, bytes]; the finalizer shares the list
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: torch.Tensor, owner: str | None = None) -> None:
        """Count the storage of `tensor`, unless it is counted already; `owner`, if given, owns it from now on.

        Also counts tensors made before the mode was active, which the dispatch mode itself does not see.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._known.get(key)
        if entry is None:
            entry = self._known[key] = [owner or self.owner, storage.nbytes()]
            weakref.finalize(storage, self._released, key, entry)
            self._change(entry, 1)
        elif owner is not None and owner != entry[0]:
            self.held[entry[0]] -= entry[1]
            self.held[owner] = self.held.get(owner, 0) + entry[1]
            entry[0] = owner

    def name(self, tensor: torch.Tensor, owner: str) -> None:
        """Make `owner` the owner of the storage of `tensor`, if it is counted at all."""
        if tensor.untyped_storage()._cdata in self._known:
            self.see(tensor, owner)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count the storage of `tensor`, which existed before."""
        self._known.setdefault(tensor.untyped_storage()._cdata, ["", 0])

    def summary(self) -> dict[str, Any]:
        """The peak's phase, owners and total; the maximum of each phase; and the whole timeline, as plain values."""
        timeline = self.timeline
        most: dict[str, int] = {}
        for phase, held in timeline:
            most[phase] = max(held, most.get(phase, held))
        worst = max(range(len(timeline)), key=lambda i: timeline[i][1])
        by_owner: dict[str, int] = {}
        for _, (owner, size), sign in self._events[: worst + 1]:
            by_owner[owner] = by_owner.get(owner, 0) + sign * size
        phase, total = timeline[worst]
        peak = {"phase": phase, "total": total, "held": {owner: size for owner, size in by_owner.items() if size}}
        return {"peak": peak, "most": most, "timeline": timeline}

    @property
    def timeline(self) -> list[tuple[str, int]]:
        sizes = (sign * entry[1] for _, entry, sign in self._events)
        return [(event[0], held) for event, held in zip(self._events, accumulate(sizes), strict=True)]

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before

    def _released(self, key: int, entry: list[Any]) -> None:
        if self._known.get(key) is entry:
            del self._known[key]
        self._change(entry, -1)

    def _change(self, entry: list[Any], sign: int) -> None:
        owner, size = entry
        if not size:
            return
        self.held[owner] = self.held.get(owner, 0) + sign * size
        self._total += sign * size
        self._events.append((self.phase, entry, sign))
        if self._total > self.peak.total:
            self.peak = Moment(self.phase, dict(self.held))
