"""Predicts what each rank holds, in bytes by owner, for every strategy, without allocating any of it.

The states (parameters, gradients, masters, optimizer states, buckets) follow from the shapes of the model's
parameters and from how DeepSpeed 0.19 lays them out: padded, cut into one slice per rank, a parameter that crosses a
border held whole on both sides. `minisft.zero.measured_memory` finds the same numbers in a live engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from minisft.errors import UserError
from minisft.zero.parameter_shapes import Shapes, elements_touched, split_size, sub_groups
from minisft.zero.strategies import DEFAULT_BUCKET, DEFAULT_PERSISTENCE, deepspeed_config, strategy_named

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

# One line per kind of engine and owner. P: parameters, e: bytes of each, W: ranks, n: tensors. Pad is P rounded up to a
# multiple of 2 W, and part = Pad / W. Q is the number of elements one rank holds at stage 3: each tensor's size over W,
# rounded up, summed.
FORMULAS: dict[str, dict[str, str]] = {
    "plain": {
        "parameters": "4 P: autocast computes in half precision, the weights stay fp32",
        "gradients": "4 P after backward",
        "optimizer states": "8 P + 4 n: Adam's two averages and a counter per tensor",
        "buckets": "ddp: 4 P, which hold the gradients and are sent; allocated all the time",
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


def predict_states(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    deepspeed: Mapping[str, Any] | None = None,
) -> list[dict[str, dict[str, int]]]:
    """Bytes of the model's states, one entry per rank: the bytes of each owner at each of `MOMENTS`.

    Ranks that hold the same share one entry. `deepspeed` is the configuration that runs; the default is the one that
    `minisft` generates. Raises `UserError` for an unknown strategy or precision, or less than one rank.
    """
    chosen = strategy_named(strategy)
    require(ranks, precision)
    stage = chosen.stage
    if deepspeed is None:
        deepspeed = generated_config(shapes, strategy, ranks, precision)
    if stage is None:
        rest, gradients = _plain(shapes, ranks, chosen.is_ddp)
    elif stage == 0:
        rest, gradients = _stage0(shapes, ranks, precision)
    elif stage < 3:
        rest, gradients = _stage12(shapes, ranks, precision)
    else:
        rest, gradients = _stage3(shapes, ranks, precision, deepspeed["zero_optimization"])
    extra = np.zeros(ranks, dtype=np.int64)
    if stage is not None and offloaded(deepspeed, "optimizer"):
        accumulation = int(deepspeed.get("gradient_accumulation_steps", 1))
        rest, gradients, extra = _offloaded(shapes, ranks, precision, stage, accumulation, rest)

    @cache
    def entry(arriving: int, kept: int) -> dict[str, dict[str, int]]:
        resting = dict.fromkeys(OWNERS, 0) | rest
        resting["offload buffers"] += kept
        after = resting | {"gradients": resting["gradients"] + arriving}
        if chosen.is_ddp:  # the gradients are views of the buckets
            after["buckets"] = 0
        return {"at rest": resting, "after backward": after}

    return [entry(*pair) for pair in zip(gradients.tolist(), extra.tolist(), strict=True)]


def distinct(predicted: Sequence[T]) -> list[T]:
    """The entries of `predict_states`, each once, however many ranks share it."""
    return list({id(entry): entry for entry in predicted}.values())


def generated_config(
    shapes: Shapes, strategy: str, ranks: int, precision: str, accumulation: int = 1, on_gpu: bool = False
) -> dict[str, Any]:
    """The configuration that `minisft` writes for such a run, where memory depends on it."""
    config = deepspeed_config(
        strategy,
        micro_batch=1,
        accumulation=accumulation,
        ranks=ranks,
        max_grad_norm=1.0,
        precision=precision,
        largest_tensor=shapes.largest,
        on_gpu=on_gpu,
    )
    return config or {}


def require(ranks: int, precision: str) -> None:
    """Raise `UserError` for less than one rank or an unknown precision."""
    if ranks < 1:
        raise UserError(f"ranks is {ranks}: give at least 1")
    if precision not in ELEMENT:
        raise UserError(f"unknown precision {precision!r}: use one of {', '.join(ELEMENT)}")


StatesOfRank = tuple[dict[str, int], np.ndarray]  # bytes at rest by owner; bytes that backward adds, by rank


def _plain(shapes: Shapes, ranks: int, ddp: bool) -> StatesOfRank:
    p, n = shapes.parameters, shapes.tensors
    rest = {"parameters": 4 * p, "optimizer states": 8 * p + STEP * n, "buckets": 4 * p if ddp else 0}
    return rest, np.full(ranks, 4 * p)


def _stage0(shapes: Shapes, ranks: int, precision: str) -> StatesOfRank:
    p, e = shapes.parameters, ELEMENT[precision]
    rest = {"parameters": e * p, "optimizer states": 8 * p + STEP * shapes.tensors}
    if precision != "fp32":
        rest["fp32 masters"] = 4 * p
    return rest, np.full(ranks, e * p)


def _stage12(shapes: Shapes, ranks: int, precision: str) -> StatesOfRank:
    e = ELEMENT[precision]
    parts = shapes.parts(ranks)
    rest = {
        "parameters": e * sum(parts) * ranks,
        "fp32 masters": 4 * sum(parts),
        "optimizer states": 8 * sum(parts) + STEP * len(parts),
    }
    return rest, e * _touched(shapes, ranks)


def _stage3(shapes: Shapes, ranks: int, precision: str, zero: Mapping[str, Any]) -> StatesOfRank:
    e = ELEMENT[precision]
    split = split_size(shapes.named, ranks)
    threshold = int(zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE))
    small = [parameter for parameter in shapes.named if parameter[1] <= threshold]
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
    target = (deepspeed or {}).get("zero_optimization", {}).get(f"offload_{what}") or {}
    return target.get("device", "none") == "cpu"


def _offloaded(
    shapes: Shapes, ranks: int, precision: str, stage: int, accumulation: int, rest: dict[str, int]
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """The states with an offloaded optimizer: bytes at rest by owner, and by rank what backward adds and what stays."""
    e = ELEMENT[precision]
    none = np.zeros(ranks, dtype=np.int64)
    if stage == 3:
        split = split_size(shapes.named, ranks)
        return rest | {"gradients": (e + 4) * split}, none, none
    parts = sum(shapes.parts(ranks))
    rest = rest | {
        "gradients": 4 * parts,
        "buckets": e * shapes.largest,
        "offload buffers": e * (parts + shapes.largest),
    }
    return rest, none, e * _touched(shapes, ranks, padding=False) if stage == 2 and accumulation > 1 else none


def _touched(shapes: Shapes, ranks: int, padding: bool = True) -> np.ndarray:
    """`elements_touched` of all param groups, int64 [ranks]."""
    return np.sum([elements_touched(group, ranks, padding) for group in shapes.groups], axis=0)


def owners_in_main_memory(deepspeed: Mapping[str, Any] | None) -> frozenset[str]:
    """The owners whose bytes a configuration keeps in main memory."""
    owners = set()
    if offloaded(deepspeed, "optimizer"):
        owners |= {"gradients", "fp32 masters", "optimizer states", "offload buffers"}
    if offloaded(deepspeed, "param"):
        owners.add("parameters")
    return frozenset(owners)


def bytes_on_gpu(held: Mapping[str, int], deepspeed: Mapping[str, Any] | None) -> dict[str, int]:
    """One rank's bytes by owner on its GPU: all of them, unless something is offloaded."""
    offloaded_owners = owners_in_main_memory(deepspeed)
    return {owner: 0 if owner in offloaded_owners else size for owner, size in held.items()}


def paper_formula(parameters: float, ranks: int, stage: int | None) -> float:
    """Bytes of model states per rank by the paper's formula: 2 bytes per parameter, 2 per gradient, 4 for the
    fp32 master and 8 for Adam's two averages.

    Stages None and 0 split nothing. Rajbhandari et al. 2020, section 3.1 and figure 1; the formula leaves out buckets,
    padding, and parameters that cross a border.
    """
    weights = gradients = 2.0 * parameters
    masters_and_states = (4.0 + 8.0) * parameters
    if (stage or 0) >= 1:
        masters_and_states /= ranks
    if (stage or 0) >= 2:
        gradients /= ranks
    if (stage or 0) >= 3:
        weights /= ranks
    return weights + gradients + masters_and_states


def total_bytes(owners: Mapping[str, int]) -> int:
    return sum(owners.values())


def most_bytes(predicted: Sequence[Mapping[str, Mapping[str, int]]], moment: str) -> int:
    """Bytes of the rank that holds the most at `moment`."""
    return max(total_bytes(rank[moment]) for rank in distinct(predicted))
