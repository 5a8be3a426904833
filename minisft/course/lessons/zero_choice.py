"""Lesson 03: the exercise on the lowest stage that fits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.zero.planner import plan
from minisft.zero.state_memory import paper_formula

STAGES = (0, 1, 2, 3)


def smallest_stage(parameters: float, ranks: int, gpu_bytes: float) -> int | None:
    """Return the lowest stage, 0 to 3, whose states fit on each GPU; None if none does.

    The states are those of half precision by the paper's formula. 1.5e9 bytes of each
    GPU are set aside for CUDA; states that fill the rest exactly fit.
    """
    for stage in (0, 1, 2, 3):
        if paper_formula(parameters, ranks, stage) <= gpu_bytes - 1.5e9:
            return stage
    return None


def _stage_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((7e9, 8, 80e9), 1, "7 billion parameters on 8 GPUs of 80 GB")
    yield Case((7e9, 8, 24e9), 3, "7 billion parameters on 8 GPUs of 24 GB")
    yield Case((70e9, 8, 80e9), None, "70 billion parameters on 8 GPUs of 80 GB, which is too much")
    yield Case((1e9, 2, 16.5e9), 1, "16 GB of states and GPUs of 16.5 GB")
    yield Case((1e9, 4, 17.5e9), 0, "16 GB of states and GPUs of 17.5 GB, which they fill")
    for _ in range(25):
        parameters, ranks = draw.uniform(0.5e9, 30e9), draw.randint(2, 32)
        gpu_bytes = draw.choice((16e9, 24e9, 40e9, 80e9))
        options = {o.strategy: o.fits for o in plan(parameters, ranks, gpu_bytes).options}
        fits = [stage for stage, name in enumerate(("ddp", "zero1", "zero2", "zero3")) if options[name]]
        yield Case((parameters, ranks, gpu_bytes), fits[0] if fits else None)


def _first(
    stages: tuple[int, ...], usable: Callable[[float, int], float], none: int | None = None
) -> Callable[..., Any]:
    """The first of `stages` that fits into `usable(gpu_bytes, ranks)`."""
    return lambda parameters, ranks, gpu_bytes: next(
        (stage for stage in stages if paper_formula(parameters, ranks, stage) <= usable(gpu_bytes, ranks)), none
    )


SMALLEST_STAGE = Exercise(
    name="03.smallest_stage",
    answer=smallest_stage,
    cases=_stage_cases,
    mistakes=(
        Mistake(
            "States that fill the rest exactly fit: compare with `<=`.",
            _first(STAGES, lambda size, ranks: math.nextafter(size - 1.5e9, 0)),
        ),
        Mistake(
            "Stage 3 is never tried: `range(3)` ends at 2, and `range(4)` gives 0 to 3.",
            _first(STAGES[:3], lambda size, ranks: size - 1.5e9),
        ),
        Mistake(
            "None is returned where stage 0 fits: 0 counts as false, so `0 or None` is None, and `if stage` is false "
            "for stage 0. Compare with None: `stage is None`.",
            lambda *arguments: smallest_stage(*arguments) or None,
        ),
        Mistake(
            "The 1.5 GB for CUDA are forgotten: the run would end with an out-of-memory error.",
            _first(STAGES, lambda size, ranks: size),
        ),
        Mistake(
            "Stage 3 is returned where nothing fits. Say so before the GPUs are rented: return None.",
            _first(STAGES, lambda size, ranks: size - 1.5e9, none=3),
        ),
        Mistake(
            "The highest stage that fits is chosen. It sends the most; take the lowest.",
            _first(STAGES[::-1], lambda size, ranks: size - 1.5e9),
        ),
        Mistake(
            "Stage 0 is left out. Where a whole copy fits on each GPU, nothing has to be split.",
            _first(STAGES[1:], lambda size, ranks: size - 1.5e9),
        ),
        Mistake(
            "The memory of all GPUs is added up. The formula gives the bytes on one rank, which one GPU has to hold.",
            _first(STAGES, lambda size, ranks: size * ranks - 1.5e9),
        ),
    ),
    hints=(
        "Try the stages in order, and return the first one that fits.",
        "paper_formula(parameters, ranks, stage) has to be at most gpu_bytes - 1.5e9; after the loop return None.",
    ),
    minutes=6,
    ask_next="What does this choice leave out, and which of it depends on the batch?",
)
