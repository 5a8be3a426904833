"""A model as ZeRO sees it: the elements of its trained parameters, and how DeepSpeed 0.19 splits them over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minisft.model.meta_model import LayerKind, layer_kinds, meta_model
from minisft.zero.strategies import DEFAULT_SUB_GROUP

# Names that transformers' Trainer excludes from weight decay; importing its own list would load `datasets` and pandas.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def decayed_names(model: Any) -> set[str]:
    """The parameters of a torch module that Trainer gives weight decay: no norms, no biases."""
    from torch.nn import LayerNorm
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [LayerNorm], list(NO_DECAY)))


@dataclass(frozen=True)
class Shapes:
    """The number of elements of every trained parameter, by param group; a shared parameter counts once.

    `groups` are lists of (name, elements) in the optimizer's order; transformers' Trainer makes two, with and without
    weight decay. `layers` describes each decoder layer.
    """

    groups: tuple[tuple[tuple[str, int], ...], ...]
    layers: tuple[LayerKind, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        return sum(elements for _, elements in self.named)

    @property
    def named(self) -> list[tuple[str, int]]:
        """Name and elements of every parameter, whatever its group."""
        return [parameter for group in self.groups for parameter in group]

    def parts(self, ranks: int) -> list[int]:
        """Elements of one rank's slice of each param group at stages 1 and 2."""
        return [partition_size(sum(elements for _, elements in group), ranks) for group in self.groups]

    @property
    def tensors(self) -> int:
        return len(self.named)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(elements for _, elements in self.named)

    @classmethod
    def of_model(cls, model: Any) -> Shapes:
        """The shapes of a torch module, on whatever device (`meta` is enough), in the groups that Trainer makes."""
        decayed = decayed_names(model)
        named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
        groups = [tuple(x for x in named if x[0] in decayed), tuple(x for x in named if x[0] not in decayed)]
        return cls(tuple(g for g in groups if g))

    @classmethod
    def of_config(cls, config: Any, trust_remote_code: bool = False) -> Shapes:
        """The same from a transformers config: a model is built without weights. Raises `UserError` if none can be."""
        model = meta_model(config, trust_remote_code)
        return replace(cls.of_model(model), layers=tuple(layer_kinds(model)))


def partition_size(elements: int, ranks: int) -> int:
    """Elements of one rank's slice of a param group at stages 1 and 2: padded to a multiple of 2 x ranks."""
    return -(-elements // (2 * ranks)) * 2


def elements_touched(group: Sequence[tuple[str, int]], ranks: int, padding: bool = True) -> np.ndarray:
    """Elements of all parameters that each rank's slice of `group` touches, and its padding, int64 [ranks].

    A parameter that crosses a border counts whole on both sides: both ranks keep its whole gradient.
    """
    sizes = np.array([elements for _, elements in group], dtype=np.int64)
    ends = sizes.cumsum()
    part = partition_size(int(ends[-1]), ranks)
    begins = np.arange(ranks, dtype=np.int64) * part
    first = np.searchsorted(ends, begins, side="right")
    last = np.searchsorted(ends - sizes, begins + part, side="left")
    before = np.concatenate([[0], ends])
    touched = np.maximum(before[last] - before[first], 0)
    return touched + padding * np.clip(begins + part - np.maximum(begins, ends[-1]), 0, None)


def split_size(group: Iterable[tuple[str, int]], ranks: int) -> int:
    """Elements of one rank's part of a param group at stage 3, which splits every tensor on its own."""
    return sum(-(-elements // ranks) for _, elements in group)


def sub_groups(group: Iterable[tuple[str, int]], ranks: int, zero: Mapping[str, Any]) -> list[int]:
    """Elements of one rank in each sub-group of a param group; stage 3 steps the sub-groups one after another.

    A sub-group collects whole tensors until it has `sub_group_size` elements.
    """
    limit, found, size = float(zero.get("sub_group_size", DEFAULT_SUB_GROUP)), [], 0
    for _, elements in group:
        size += -(-elements // ranks)
        if size >= limit:
            found.append(size)
            size = 0
    return [*found, size] if size else found
