"""The most that a rank holds during a step: the states, and beside them what forward, backward and step take.

Two moments compete. In forward and backward the activations and the logits lie beside the states, and the gradients
arrive; in the step DeepSpeed flattens gradients and makes fp32 copies of them. Which is larger depends on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisft.zero.activation_trace import ActivationTrace
from minisft.zero.state_memory import (
    ELEMENT,
    Shapes,
    generated_config,
    offloaded,
    partition_size,
    sub_groups,
    total_bytes,
)
from minisft.zero.strategies import zero_stage

PERSISTENCE = "stage3_param_persistence_threshold"
STEP_OWNER = "temporaries of the step"


def at_peak(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    predicted: Sequence[Mapping[str, dict[str, int]]],
    dry: ActivationTrace,
    deepspeed: Mapping[str, Any] | None = None,
    accumulation: int = 1,
) -> list[dict[str, int]]:
    """Bytes by owner at each rank's worst moment, given what `zero_memory.predict` says and a micro-batch's dry run.

    With `accumulation` micro-batches per step, a later one runs beside the gradients of those before.

    Exact for vanilla; for the others within a few percent, tested against live engines. What is offloaded counts as
    well, and `zero_memory.on_gpu` leaves it out again.
    """
    if deepspeed is None and zero_stage(strategy) is not None:
        deepspeed = generated_config(shapes, strategy, ranks, precision)
    zero = (deepspeed or {}).get("zero_optimization", {})
    peaks = []
    for moments in predicted:
        computing = _computing(shapes, strategy, precision, moments, dry, zero, accumulation)
        stepping = _stepping(shapes, strategy, ranks, precision, moments, zero, offloaded(deepspeed, "optimizer"))
        peaks.append(max(computing, stepping, key=total_bytes))
    return peaks


def _computing(
    shapes: Shapes,
    strategy: str,
    precision: str,
    moments: Mapping[str, dict[str, int]],
    dry: ActivationTrace,
    zero: Mapping[str, Any],
    accumulation: int,
) -> dict[str, int]:
    stage, e = zero_stage(strategy), ELEMENT[precision]
    held = dict(moments["at rest"])
    # Stage 1 and plain data parallelism keep each whole gradient until backward is over, stage 2 this rank's share.
    keeps_all = strategy in ("vanilla", "zero0", "zero1")
    kept = moments["after backward"]["gradients"] - held["gradients"] if stage == 2 else 0
    if stage == 3:
        passing = max(dry.peak_freeing, dry.reducing, key=total_bytes)
    elif keeps_all and accumulation == 1:
        passing = dry.peak
    else:  # with accumulation all that is kept lies there from the first micro-batch on
        whole = (e if stage is not None else 4) * shapes.parameters if keeps_all else kept
        passing = _most_freeing(dry, whole, accumulation > 1, shapes.parameters)
    for owner, size in passing.items():
        held[owner] = held.get(owner, 0) + size
    if stage in (1, 2):
        held["buckets"] += e * int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        split = sum(n for group in shapes.groups for _, n in group if n > int(zero[PERSISTENCE]))
        live = min(int(zero["stage3_max_live_parameters"]), split)
        held["persistent parameters"] += e * live
    return held


def _most_freeing(dry: ActivationTrace, kept: int, already: bool, parameters: int) -> dict[str, int]:
    """The worst moment of backward where gradients go as they arrive, but for `kept` bytes in the end.

    `already` says that those lie there from the beginning.
    """
    return max(
        ({**s.held, "gradients": kept if already else kept * s.arrived // parameters} for s in dry.stretches),
        key=total_bytes,
    )


def _stepping(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    moments: Mapping[str, dict[str, int]],
    zero: Mapping[str, Any],
    away: bool,
) -> dict[str, int]:
    stage = zero_stage(strategy)
    held = dict(moments["after backward"])
    if away:
        return held  # gradients wait in fp32 where the optimizer is
    if stage == 0:
        held[STEP_OWNER] = 4 * shapes.parameters  # flattened to be reduced, or copied for the masters
    elif stage in (1, 2):
        part = max(partition_size(sum(n for _, n in group), ranks) for group in shapes.groups)
        held[STEP_OWNER] = (4 if precision == "fp32" else 6) * part
    elif stage == 3:  # one sub-group after the other, flattened and then in fp32; before, a tensor's norm in fp64
        stepped = max(n for group in shapes.groups for n in sub_groups(group, ranks, zero))
        held[STEP_OWNER] = max((4 if precision == "fp32" else 6) * stepped, 8 * -(-shapes.largest // ranks))
    return held
