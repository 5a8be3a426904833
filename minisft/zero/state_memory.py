"""What each rank holds, in bytes by owner, predicted for every strategy without allocating any of it.

The states (parameters, gradients, masters, optimizer states, buckets) follow from the shapes of the model's
parameters and from how DeepSpeed 0.19 lays them out: padded, cut into one slice per rank, a parameter that lies over
a border held whole on both sides. `minisft.zero.measured_memory` finds the same numbers in a live engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from minisft.errors import UserError
from minisft.model.meta_model import LayerKind, layer_kinds, meta_model
from minisft.zero.strategies import (
    DEFAULT_BUCKET,
    DEFAULT_PERSISTENCE,
    DEFAULT_SUB_GROUP,
    STRATEGIES,
    deepspeed_config,
    zero_stage,
)

T = TypeVar("T")
OWNERS = (
    "parameters",
    "gradients",
    "fp32 masters",
    "optimizer states",
    "buckets",
    "persistent parameters",
    "offload buffers",
)
MOMENTS = ("at rest", "after backward")
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
STEP = 4  # bytes of AdamW's own step counter, an fp32 scalar per tensor it steps

DEEPSPEED = "DeepSpeed 0.19, runtime/zero"
PAPER = "Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1"

# One line per kind of engine and owner. P parameters, e bytes of each, W ranks, n tensors; Pad = P rounded up to a
# multiple of 2 W, part = Pad / W; Q = the sum over tensors of their elements / W, each rounded up.
FORMULAS: dict[str, dict[str, str]] = {
    "plain": {
        "parameters": "4 P: autocast computes in half precision, the weights stay fp32",
        "gradients": "4 P after backward",
        "optimizer states": "8 P + 4 n: Adam's two averages and a counter per tensor",
        "buckets": "ddp: 4 P, in which the gradients lie and travel; allocated all the time",
    },
    "stage 0": {
        "parameters": "e P",
        "gradients": "e P after backward",
        "fp32 masters": "4 P in half precision; in fp32 the parameters are the masters",
        "optimizer states": "8 P + 4 n",
    },
    "stage 1, 2": {
        "parameters": "e Pad per group, whole on every rank",
        "gradients": "after backward e x all of every parameter that touches this rank's slice, and its padding",
        "fp32 masters": "4 part per group; a copy in fp32, too",
        "optimizer states": "8 part + 4 per group",
    },
    "stage 3": {
        "parameters": "e Q",
        "gradients": "e Q, allocated all the time",
        "fp32 masters": "4 Q",
        "optimizer states": "8 Q + 4 per sub-group (sub_group_size)",
        "buckets": "e x reduce_bucket_size, allocated all the time",
        "persistent parameters": "e W Q over parameters up to the persistence threshold, kept whole; none on 1 rank",
    },
    "stage 1, 2, offloaded": {
        "parameters": "e Pad per group, whole on every rank, on the GPU",
        "gradients": "4 part per group in main memory, allocated all the time",
        "fp32 masters": "4 part per group in main memory",
        "optimizer states": "8 part + 4 per group in main memory",
        "buckets": "e x the largest parameter on the GPU: a gradient on its way",
        "offload buffers": "in main memory e part per group, e x the largest parameter; with accumulation also e x all "
        "of every parameter that touches this rank's slice",
    },
    "stage 3, offloaded": {
        "parameters": "e Q in main memory with offload_param",
        "gradients": "(e + 4) Q in main memory, allocated all the time",
        "fp32 masters": "4 Q in main memory",
        "optimizer states": "8 Q + 4 per sub-group in main memory",
        "buckets": "e x reduce_bucket_size on the GPU",
        "persistent parameters": "e W Q over parameters up to the persistence threshold, on the GPU",
    },
}


# What transformers' Trainer spares from weight decay, by name; to ask it itself would load `datasets` and pandas.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def decayed_names(model: Any) -> set[str]:
    """The parameters of a torch module that Trainer gives weight decay: no norms, no biases."""
    from torch.nn import LayerNorm
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [LayerNorm], list(NO_DECAY)))


@dataclass(frozen=True)
class Shapes:
    """A model as ZeRO sees it: the elements of every trained parameter, shared ones once, by param group.

    `groups` are lists of (name, elements) in the optimizer's order; transformers' Trainer makes two, with and without
    weight decay. `buffer_bytes` is what else the module holds. `source` says where it comes from. `layers` says of
    each decoder layer what it consists of.
    """

    groups: tuple[tuple[tuple[str, int], ...], ...]
    buffer_bytes: int = 0
    source: str = ""
    layers: tuple[LayerKind, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        return sum(elements for group in self.groups for _, elements in group)

    @property
    def tensors(self) -> int:
        return sum(map(len, self.groups))

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(elements for group in self.groups for _, elements in group)

    @classmethod
    def of_model(cls, model: Any, source: str = "") -> Shapes:
        """The shapes of a torch module, on whatever device (`meta` is enough), in the groups that Trainer makes."""
        decayed = decayed_names(model)
        named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
        groups = [tuple(x for x in named if x[0] in decayed), tuple(x for x in named if x[0] not in decayed)]
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        return cls(tuple(g for g in groups if g), buffers, source or type(model).__name__)

    @classmethod
    def of_config(cls, config: Any, trust_remote_code: bool = False, source: str = "") -> Shapes:
        """The same from a transformers config: a model is built without weights. Raises `UserError` if none can be."""
        model = meta_model(config, trust_remote_code)
        shapes = cls.of_model(model, source or f"{type(model).__name__} built from its config, without weights")
        return replace(shapes, layers=tuple(layer_kinds(model)))


def partition_size(elements: int, ranks: int) -> int:
    """Elements of one rank's slice of a param group at stages 1 and 2: padded to a multiple of 2 x ranks."""
    return -(-elements // (2 * ranks)) * 2


def elements_touched(group: Sequence[tuple[str, int]], ranks: int, padding: bool = True) -> np.ndarray:
    """For each rank the elements, int64 [ranks], of all parameters that its slice of `group` touches, and its padding.

    A parameter over a border counts whole on both sides: each of the two ranks keeps its whole gradient.
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
    """Elements of one rank's part of a param group at stage 3, where every tensor is split by itself."""
    return sum(-(-elements // ranks) for _, elements in group)


def sub_groups(group: Iterable[tuple[str, int]], ranks: int, zero: Mapping[str, Any]) -> list[int]:
    """Elements of one rank in each sub-group of a param group, which stage 3 steps one after the other.

    Whole tensors are added up until there are `sub_group_size` elements.
    """
    limit, found, size = float(zero.get("sub_group_size", DEFAULT_SUB_GROUP)), [], 0
    for _, elements in group:
        size += -(-elements // ranks)
        if size >= limit:
            found.append(size)
            size = 0
    return [*found, size] if size else found


def predict_states(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    deepspeed: Mapping[str, Any] | None = None,
) -> list[dict[str, dict[str, int]]]:
    """Bytes of the model's states, one entry per rank: for each of `MOMENTS` its owners' bytes.

    Ranks that hold the same share an entry.

    `deepspeed` is the configuration that runs; without one it is what `minisft` generates. Raises `UserError` for a
    strategy, number of ranks or precision that cannot be.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    require(ranks, precision)
    stage = zero_stage(strategy)
    if stage is not None and deepspeed is None:
        deepspeed = generated_config(shapes, strategy, ranks, precision)
    if stage is None:
        rest, gradients = _plain(shapes, ranks, strategy == "ddp")
    elif stage == 0:
        rest, gradients = _stage0(shapes, ranks, precision)
    elif stage < 3:
        rest, gradients = _stage12(shapes, ranks, precision)
    else:
        rest, gradients = _stage3(shapes, ranks, precision, deepspeed["zero_optimization"])
    extra = np.zeros(ranks, dtype=np.int64)
    if deepspeed and offloaded(deepspeed, "optimizer"):
        accumulation = int(deepspeed.get("gradient_accumulation_steps", 1))
        rest, gradients, extra = _offloaded(shapes, ranks, precision, stage, accumulation, rest)

    @cache
    def entry(arriving: int, kept: int) -> dict[str, dict[str, int]]:
        resting = dict.fromkeys(OWNERS, 0) | rest
        resting["offload buffers"] += kept
        after = resting | {"gradients": resting["gradients"] + arriving}
        if strategy == "ddp":  # the gradients lie in the buckets
            after["buckets"] = 0
        return {"at rest": resting, "after backward": after}

    return [entry(*pair) for pair in zip(gradients.tolist(), extra.tolist(), strict=True)]


def distinct(predicted: Sequence[T]) -> list[T]:
    """The entries of `predict_states` without those that ranks share."""
    return list({id(entry): entry for entry in predicted}.values())


def generated_config(
    shapes: Shapes, strategy: str, ranks: int, precision: str, accumulation: int = 1, on_gpu: bool = False
) -> dict[str, Any]:
    """The configuration that `minisft` writes for such a run, as far as memory depends on it."""
    return deepspeed_config(
        strategy,
        micro_batch=1,
        accumulation=accumulation,
        ranks=ranks,
        max_grad_norm=1.0,
        precision=precision,
        largest_tensor=shapes.largest,
        on_gpu=on_gpu,
    )


def require(ranks: int, precision: str) -> None:
    """Raise `UserError` for a number of ranks or a precision that cannot be."""
    if ranks < 1:
        raise UserError(f"ranks is {ranks}: give at least 1")
    if precision not in ELEMENT:
        raise UserError(f"unknown precision {precision!r}: use one of {', '.join(ELEMENT)}")


Found = tuple[dict[str, int], np.ndarray]  # at rest; bytes of gradients that backward adds, by rank


def _plain(shapes: Shapes, ranks: int, ddp: bool) -> Found:
    p, n = shapes.parameters, shapes.tensors
    rest = {"parameters": 4 * p, "optimizer states": 8 * p + STEP * n, "buckets": 4 * p if ddp else 0}
    return rest, np.full(ranks, 4 * p)


def _stage0(shapes: Shapes, ranks: int, precision: str) -> Found:
    p, e = shapes.parameters, ELEMENT[precision]
    rest = {"parameters": e * p, "optimizer states": 8 * p + STEP * shapes.tensors}
    if precision != "fp32":
        rest["fp32 masters"] = 4 * p
    return rest, np.full(ranks, e * p)


def _stage12(shapes: Shapes, ranks: int, precision: str) -> Found:
    e = ELEMENT[precision]
    parts = [partition_size(sum(n for _, n in group), ranks) for group in shapes.groups]
    rest = {
        "parameters": e * sum(parts) * ranks,
        "fp32 masters": 4 * sum(parts),
        "optimizer states": 8 * sum(parts) + STEP * len(parts),
    }
    return rest, e * sum(elements_touched(group, ranks) for group in shapes.groups)


def _stage3(shapes: Shapes, ranks: int, precision: str, zero: Mapping[str, Any]) -> Found:
    e = ELEMENT[precision]
    split = sum(split_size(group, ranks) for group in shapes.groups)
    threshold = int(zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE))
    small = [x for group in shapes.groups for x in group if x[1] <= threshold]
    rest = {
        "parameters": e * split,
        "gradients": e * split,
        "fp32 masters": 4 * split,
        "optimizer states": 8 * split + STEP * sum(len(sub_groups(group, ranks, zero)) for group in shapes.groups),
        "buckets": e * int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
        "persistent parameters": e * ranks * split_size(small, ranks) if ranks > 1 else 0,
    }
    return rest, np.zeros(ranks, dtype=np.int64)


def offloaded(deepspeed: Mapping[str, Any] | None, what: str) -> bool:
    """Whether a DeepSpeed configuration keeps `what`, `optimizer` or `param`, in main memory."""
    place = (deepspeed or {}).get("zero_optimization", {}).get(f"offload_{what}") or {}
    return place.get("device", "none") == "cpu"


def _offloaded(
    shapes: Shapes, ranks: int, precision: str, stage: int, accumulation: int, rest: dict[str, int]
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """What offloading the optimizer changes, wherever it lies: at rest, in backward, and by rank at rest."""
    e = ELEMENT[precision]
    none = np.zeros(ranks, dtype=np.int64)
    if stage == 3:
        split = sum(split_size(group, ranks) for group in shapes.groups)
        return rest | {"gradients": (e + 4) * split}, none, none
    parts = sum(partition_size(sum(n for _, n in group), ranks) for group in shapes.groups)
    rest = rest | {
        "gradients": 4 * parts,
        "buckets": e * shapes.largest,
        "offload buffers": e * (parts + shapes.largest),
    }
    kept = (
        e * sum(elements_touched(group, ranks, padding=False) for group in shapes.groups) if accumulation > 1 else none
    )
    return rest, none, kept


def bytes_in_main_memory(deepspeed: Mapping[str, Any] | None) -> frozenset[str]:
    """The owners whose bytes a configuration keeps away from the GPU."""
    away = set()
    if offloaded(deepspeed, "optimizer"):
        away |= {"gradients", "fp32 masters", "optimizer states", "offload buffers"}
    if offloaded(deepspeed, "param"):
        away.add("parameters")
    return frozenset(away)


def bytes_on_gpu(held: Mapping[str, int], deepspeed: Mapping[str, Any] | None) -> dict[str, int]:
    """Of one rank's bytes by owner, those that lie on its GPU; all of them, unless something is offloaded."""
    away = bytes_in_main_memory(deepspeed)
    return {owner: 0 if owner in away else size for owner, size in held.items()}


def paper_formula(parameters: float, ranks: int, stage: int | None, optimizer: int = 12) -> float:
    """Bytes of model states per rank by the paper's formula: fp16 parameters and gradients, `optimizer` bytes more.

    Stage None or 0 splits nothing. Rajbhandari et al. 2020, section 3.1 and figure 1; it knows no buckets, padding
    or parameters over a border.
    """
    weights = gradients = 2.0 * parameters
    states = float(optimizer) * parameters
    if (stage or 0) >= 1:
        states /= ranks
    if (stage or 0) >= 2:
        gradients /= ranks
    if (stage or 0) >= 3:
        weights /= ranks
    return weights + gradients + states


def paper_largest_model(memory: float, ranks: int, stage: int | None, optimizer: int = 12) -> float:
    """The largest number of parameters whose model states fit into `memory` bytes per rank, by the same formula."""
    return memory / paper_formula(1, ranks, stage, optimizer)


def total_bytes(owners: Mapping[str, int]) -> int:
    return sum(owners.values())


def most_bytes(predicted: Sequence[Mapping[str, Mapping[str, int]]], moment: str) -> int:
    """Bytes of the rank that holds the most at `moment`."""
    if not predicted:
        return math.nan
    return max(total_bytes(rank[moment]) for rank in distinct(predicted))
