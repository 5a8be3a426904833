"""Predicts the most that a rank holds during a step: the states, and what forward, backward and the step need besides.

Two moments compete. In forward and backward the activations, logits and arriving gradients are held beside the states;
in the step DeepSpeed flattens gradients and makes fp32 copies of them. The batch decides which is larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisft.zero.activation_trace import ActivationTrace
from minisft.zero.parameter_shapes import Shapes, partition_size, sub_groups
from minisft.zero.state_memory import ELEMENT, generated_config, offloaded, total_bytes
from minisft.zero.strategies import strategy_named

PERSISTENCE = "stage3_param_persistence_threshold"
STEP_OWNER = "temporaries of the step"


def at_peak(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    predicted: Sequence[Mapping[str, dict[str, int]]],
    trace: ActivationTrace,
    deepspeed: Mapping[str, Any] | None = None,
    accumulation: int = 1,
) -> list[dict[str, int]]:
    """Bytes by owner at each rank's worst moment, from `predict_states` and the trace of one micro-batch.

    With `accumulation` micro-batches per step, the later ones run beside the gradients of the earlier ones.

    Exact for vanilla; within a few percent for the others, tested against live engines. Offloaded bytes are included;
    `state_memory.bytes_on_gpu` removes them.
    """
    if deepspeed is None and strategy_named(strategy).stage is not None:
        deepspeed = generated_config(shapes, strategy, ranks, precision)
    zero = (deepspeed or {}).get("zero_optimization", {})
    peaks = []
    for moments in predicted:
        computing = _computing(shapes, strategy, precision, moments, trace, zero, accumulation)
        stepping = _stepping(shapes, strategy, ranks, precision, moments, zero, offloaded(deepspeed, "optimizer"))
        peaks.append(max(computing, stepping, key=total_bytes))
    return peaks


def _computing(
    shapes: Shapes,
    strategy: str,
    precision: str,
    moments: Mapping[str, dict[str, int]],
    trace: ActivationTrace,
    zero: Mapping[str, Any],
    accumulation: int,
) -> dict[str, int]:
    chosen, e = strategy_named(strategy), ELEMENT[precision]
    stage = chosen.stage
    held = dict(moments["at rest"])
    # Up to stage 1 every whole gradient is kept until backward ends; stage 2 keeps this rank's share.
    keeps_all = chosen.is_one_process or stage in (0, 1)
    kept = moments["after backward"]["gradients"] - held["gradients"] if stage == 2 else 0
    if stage == 3:
        passing = max(trace.peak_freeing, trace.reducing, key=total_bytes)
    elif keeps_all and accumulation == 1:
        passing = trace.peak
    else:  # with accumulation everything kept is there from the first micro-batch on
        whole = (e if stage is not None else 4) * shapes.parameters if keeps_all else kept
        passing = _most_freeing(trace, whole, accumulation > 1, shapes.parameters)
    for owner, size in passing.items():
        held[owner] = held.get(owner, 0) + size
    if stage in (1, 2):
        held["buckets"] += e * int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        split = sum(n for group in shapes.groups for _, n in group if n > int(zero[PERSISTENCE]))
        live = min(int(zero["stage3_max_live_parameters"]), split)
        held["persistent parameters"] += e * live
    return held


def _most_freeing(trace: ActivationTrace, kept: int, already: bool, parameters: int) -> dict[str, int]:
    """The worst moment of a backward pass that frees gradients as they arrive, except for `kept` bytes.

    With `already`, those bytes are held from the beginning.
    """
    return max(
        ({**s.held, "gradients": kept if already else kept * s.arrived // parameters} for s in trace.stretches),
        key=total_bytes,
    )


def _stepping(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    moments: Mapping[str, dict[str, int]],
    zero: Mapping[str, Any],
    optimizer_is_offloaded: bool,
) -> dict[str, int]:
    stage = strategy_named(strategy).stage
    held = dict(moments["after backward"])
    if optimizer_is_offloaded:
        return held  # the gradients are kept in fp32 in main memory
    if stage == 0:
        held[STEP_OWNER] = 4 * shapes.parameters  # flattened to be reduced, or copied for the masters
    elif stage in (1, 2):
        part = max(partition_size(sum(n for _, n in group), ranks) for group in shapes.groups)
        held[STEP_OWNER] = (4 if precision == "fp32" else 6) * part
    elif stage == 3:  # one sub-group at a time, flattened and then in fp32; before that a tensor's norm in fp64
        stepped = max(n for group in shapes.groups for n in sub_groups(group, ranks, zero))
        held[STEP_OWNER] = max((4 if precision == "fp32" else 6) * stepped, 8 * -(-shapes.largest // ranks))
    return held
