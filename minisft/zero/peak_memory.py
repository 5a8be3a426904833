"""Predicts the most that a rank holds during a step: the states, and what forward, backward and the step need besides.

Two moments compete. In forward and backward the activations, logits and arriving gradients are held beside the states;
in the step DeepSpeed flattens gradients and makes fp32 copies of them. The batch decides which is larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.zero.activation_trace import ActivationTrace
from minisft.zero.parameter_shapes import Shapes, sub_groups
from minisft.zero.state_memory import ELEMENT, generated_config, offloaded, total_bytes
from minisft.zero.strategies import Strategy, strategy_named

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
    chosen = strategy_named(strategy)
    if deepspeed is None and chosen.stage is not None:
        deepspeed = generated_config(shapes, strategy, ranks, precision)
    zero = (deepspeed or {}).get("zero_optimization", {})
    step = _Step(shapes, chosen, ranks, precision, zero, offloaded(deepspeed, "optimizer"), trace, accumulation)
    return [max(step.computing(moments), step.stepping(moments), key=total_bytes) for moments in predicted]


@dataclass(frozen=True)
class _Step:
    """One optimizer step of a run, as `at_peak` is asked for it; `moments` are those of one rank."""

    shapes: Shapes
    strategy: Strategy
    ranks: int
    precision: str
    zero: Mapping[str, Any]
    optimizer_is_offloaded: bool
    trace: ActivationTrace
    accumulation: int

    def computing(self, moments: Mapping[str, dict[str, int]]) -> dict[str, int]:
        """Bytes by owner at the worst moment of forward and backward."""
        stage, zero, trace, e = self.strategy.stage, self.zero, self.trace, ELEMENT[self.precision]
        held = dict(moments["at rest"])
        # Up to stage 1 every whole gradient is kept until backward ends; stage 2 keeps this rank's share.
        keeps_all = self.strategy.is_one_process or stage in (0, 1)
        kept = moments["after backward"]["gradients"] - held["gradients"] if stage == 2 else 0
        if stage == 3:
            passing = max(trace.peak_freeing, trace.reducing, key=total_bytes)
        elif keeps_all and self.accumulation == 1:
            passing = trace.peak
        else:  # with accumulation everything kept is there from the first micro-batch on
            whole = (e if stage is not None else 4) * self.shapes.parameters if keeps_all else kept
            passing = self._most_freeing(whole)
        for owner, size in passing.items():
            held[owner] = held.get(owner, 0) + size
        if stage in (1, 2):
            held["buckets"] += e * int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
        if stage == 3:
            split = sum(n for _, n in self.shapes.named if n > int(zero[PERSISTENCE]))
            live = min(int(zero["stage3_max_live_parameters"]), split)
            held["persistent parameters"] += e * live
        return held

    def _most_freeing(self, kept: int) -> dict[str, int]:
        """The worst moment of a backward pass that frees gradients as they arrive, except for `kept` bytes.

        With accumulation, those bytes are held from the beginning.
        """
        already, parameters = self.accumulation > 1, self.shapes.parameters
        return max(
            (
                {**s.held, "gradients": kept if already else kept * s.arrived // parameters}
                for s in self.trace.stretches
            ),
            key=total_bytes,
        )

    def stepping(self, moments: Mapping[str, dict[str, int]]) -> dict[str, int]:
        """Bytes by owner in the optimizer's step."""
        shapes, ranks, stage = self.shapes, self.ranks, self.strategy.stage
        each = 4 if self.precision == "fp32" else 6  # flattened, and then in fp32
        held = dict(moments["after backward"])
        if self.optimizer_is_offloaded:
            return held  # the gradients are kept in fp32 in main memory
        if stage == 0:
            held[STEP_OWNER] = 4 * shapes.parameters  # flattened to be reduced, or copied for the masters
        elif stage in (1, 2):
            held[STEP_OWNER] = each * max(shapes.parts(ranks))
        elif stage == 3:  # one sub-group at a time; before that a tensor's norm in fp64
            stepped = max(n for group in shapes.groups for n in sub_groups(group, ranks, self.zero))
            held[STEP_OWNER] = max(each * stepped, 8 * -(-shapes.largest // ranks))
        return held
