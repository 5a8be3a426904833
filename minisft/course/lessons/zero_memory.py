"""Lesson 03: what each rank holds and sends at each stage of ZeRO."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.zero_choice import SMALLEST_STAGE
from minisft.course.lessons.zero_partition import OWNERS_OF_TENSORS, PARTITION
from minisft.course.predictions import Choice, Interval, Number, Prediction
from minisft.zero.communication import bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.state_memory import paper_formula

STAGES = (0, 1, 2, 3)


def state_bytes(parameters: int, ranks: int, stage: int, precision: str) -> float:
    """Return the bytes of model states on one rank.

    `stage` is 0 to 3. `precision` is "half" (2 bytes per parameter, 2 per gradient, 4
    per fp32 master, 8 for Adam's averages) or "fp32" (4, 4, no master copy, 8).
    """
    each, master = (2, 4) if precision == "half" else (4, 0)
    weights = gradients = float(each * parameters)
    optimizer = float((master + 8) * parameters)
    if stage >= 1:
        optimizer /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return weights + gradients + optimizer


def _state_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((10, 1, 0, "half"), 160, "10 parameters in half precision, on one rank")
    yield Case((10, 4, 0, "fp32"), 160, "10 parameters in fp32 at stage 0, on 4 ranks")
    yield Case((8, 4, 1, "half"), 56, "8 parameters in half precision at stage 1, on 4 ranks")
    yield Case((8, 4, 2, "fp32"), 56, "8 parameters in fp32 at stage 2, on 4 ranks")
    for _ in range(10):
        parameters, ranks = draw.randint(1000, 10**10), draw.randint(2, 64)
        for stage in STAGES:
            yield Case((parameters, ranks, stage, "half"), paper_formula(parameters, ranks, stage))
        split = {0: 0, 1: 8, 2: 12, 3: 16}  # of 16 bytes per parameter, in fp32
        for stage, part in split.items():
            expected = (16 - part) * parameters + part * parameters / ranks
            yield Case((parameters, ranks, stage, "fp32"), expected)


def _states(
    half: tuple[int, int, int, int] = (2, 2, 4, 8),
    fp32: tuple[int, int, int, int] = (4, 4, 0, 8),
    split_from: tuple[int, int, int, int] = (3, 2, 1, 1),
) -> Callable[..., float]:
    """Bytes of parameters, gradients, masters and averages, each split from its stage on."""

    def answer(parameters: int, ranks: int, stage: int, precision: str) -> float:
        sizes = half if precision == "half" else fp32
        split = (stage >= first for first in split_from)
        return sum(parameters * n / (ranks if s else 1) for n, s in zip(sizes, split, strict=True))

    return answer


STATE_BYTES = Exercise(
    name="03.state_bytes",
    answer=state_bytes,
    cases=_state_cases,
    mistakes=(
        Mistake(
            "The master copy is missing. In half precision an fp32 copy of each parameter is kept beside it, 4 bytes.",
            _states(half=(2, 2, 0, 8)),
        ),
        Mistake(
            "Adam is counted once. It keeps two averages, of the gradients and of their squares: 4 + 4 bytes.",
            _states(half=(2, 2, 4, 4), fp32=(4, 4, 0, 4)),
        ),
        Mistake(
            "There is a master copy in fp32 too. In this formula the fp32 parameters are the masters.",
            _states(fp32=(4, 4, 4, 8)),
        ),
        Mistake(
            "The gradients are already split at stage 1. It splits only masters and optimizer states.",
            _states(split_from=(3, 1, 1, 1)),
        ),
        Mistake(
            "The parameters are already split at stage 2. Every rank keeps them whole until stage 3.",
            _states(split_from=(2, 2, 1, 1)),
        ),
        Mistake(
            "Everything is divided by the ranks. Only what the stage splits is; the rest every rank holds whole.",
            _states(split_from=(1, 1, 1, 1)),
        ),
    ),
    hints=(
        "Add up parameters, gradients, and what the optimizer keeps; divide each by the ranks from its stage on.",
        "The optimizer keeps 12 bytes in half precision and 8 in fp32, split from stage 1; gradients from 2, "
        "parameters from 3.",
    ),
    minutes=8,
    ask_next="From how many ranks on does stage 1 save less than half of what stage 2 saves?",
    tolerance=1e-9,
)


def sent_bytes(size: int, ranks: int, stage: int, micro_batches: int) -> float:
    """Return the bytes that each rank sends in one optimizer step, on a ring.

    `size` is the bytes of all parameters, and also of all gradients. `stage` is 0 to 3,
    and `micro_batches` is the number of micro-batches per step.
    """
    reduced = 1 if stage <= 1 else micro_batches
    gathered = 2 * micro_batches if stage == 3 else 1
    return (reduced + gathered) * size * (ranks - 1) / ranks


def _traffic_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((100, 2, 1, 1), 100, "100 bytes of parameters at stage 1, on 2 ranks")
    yield Case((100, 4, 0, 8), 150, "100 bytes at stage 0 with 8 micro-batches, on 4 ranks")
    yield Case((100, 2, 2, 3), 200, "100 bytes at stage 2 with 3 micro-batches, on 2 ranks")
    yield Case((100, 2, 3, 2), 300, "100 bytes at stage 3 with 2 micro-batches, on 2 ranks")
    for _ in range(8):
        ranks, micro_batches = draw.randint(2, 16), draw.randint(2, 16)
        elements = 2 * ranks * draw.randint(10_000, 90_000)  # no padding, and nothing persistent
        shapes = Shapes(((("tensor", elements),),))
        for stage in STAGES:
            moved = predict_traffic(shapes, f"zero{stage}", ranks, "fp32", micro_batches)
            yield Case((4 * elements, ranks, stage, micro_batches), bytes_sent(moved, ranks))


def _sends(
    times: Callable[[int, int], float], share: Callable[[int], float] = lambda ranks: (ranks - 1) / ranks
) -> Callable[..., float]:
    """Answers with `times(stage, micro_batches)` the parameters' bytes, of which `share(ranks)` is sent."""
    return lambda size, ranks, stage, n: times(stage, n) * size * share(ranks)


TRAFFIC = Exercise(
    name="03.traffic",
    answer=sent_bytes,
    cases=_traffic_cases,
    mistakes=(
        Mistake(
            "The share (ranks - 1) / ranks is forgotten: on a ring no rank sends its own part to itself.",
            _sends(lambda stage, n: (2, 2, n + 1, 3 * n)[stage], lambda ranks: 1),
        ),
        Mistake(
            "Stage 1 is multiplied by the micro-batches, too. It keeps whole gradients and reduces them once per step.",
            _sends(lambda stage, n: (2, n + 1, n + 1, 3 * n)[stage]),
        ),
        Mistake(
            "Stage 2 reduces only once. It keeps only its slice of the gradients, so it reduces every micro-batch's.",
            _sends(lambda stage, n: (2, 2, 2, 3 * n)[stage]),
        ),
        Mistake(
            "Stage 2 gathers the parameters in every micro-batch. They change once per step, and are gathered once.",
            _sends(lambda stage, n: (2, 2, 2 * n, 3 * n)[stage]),
        ),
        Mistake(
            "Stage 3 gathers the parameters once per micro-batch. It gathers them in forward, and again in backward.",
            _sends(lambda stage, n: (2, 2, n + 1, 2 * n)[stage]),
        ),
        Mistake(
            "Micro-batches are left out at stage 3. Every one gathers the parameters twice and reduces its gradients.",
            _sends(lambda stage, n: (2, 2, n + 1, 3)[stage]),
        ),
    ),
    hints=(
        "Count how often a step reduces all gradients and how often it gathers all parameters; an all-reduce is both.",
        "Reduced: once at stages 0 and 1, else once per micro-batch. Gathered: once, but at stage 3 twice per "
        "micro-batch. Multiply the sum by the bytes and by (ranks - 1) / ranks.",
    ),
    minutes=10,
    ask_next="At how many micro-batches does stage 2 send as much per step as stage 3 does with one?",
    tolerance=1e-9,
)


PREDICTIONS: dict[str, Prediction] = {
    "moved": Interval(
        asks="the share of weights stored in bf16 that three steps change",
        stand_in=[50, 100],
        lesson="An update below half the distance to the next bf16 number rounds back to the old weight, unnoticed.",
        unit="%",
    ),
    "half": Number(
        asks="bytes of model states per parameter in half precision",
        stand_in=8,
        lesson="Half precision halves parameters and gradients, and adds a master copy of 4 bytes.",
        unit="bytes",
    ),
    "largest_cut": Choice(
        asks="the cut that saves the most bytes on 64 ranks",
        stand_in="parameters",
        lesson="12 of the 16 bytes belong to masters and optimizer states, which stage 1 splits.",
        options=("masters and optimizer states", "gradients", "parameters"),
    ),
    "border": Choice(
        asks="where stage 1 puts the border between two ranks",
        stand_in="between two layers",
        lesson="Stages 1 and 2 cut one flat array into equal slices, wherever the borders fall.",
        options=("between two layers", "between two tensors", "inside a tensor"),
    ),
    "off_by": Number(
        asks="the largest error of the predicted bytes of four runs",
        stand_in=1_000_000,
        lesson="The states follow from the shapes and the configuration alone, so they can be predicted exactly.",
        unit="bytes",
    ),
    "invisible": Choice(
        asks="the setting that costs nothing at rest and much within a step",
        stand_in="persistent parameters",
        lesson="Live parameters are gathered and freed within a step, so memory between steps does not show them.",
        options=("a large bucket", "persistent parameters", "live parameters"),
    ),
    "peak": Choice(
        asks="the phase of a step in which zero1 holds the most",
        stand_in="step",
        lesson="In backward the states, the activations that are left, and the gradients are all there at once.",
        options=("forward", "backward", "step"),
    ),
    "sends_more": Choice(
        asks="whether stage 1 or stage 2 sends more with 8 micro-batches per step",
        stand_in="stage 1",
        lesson="Stage 2 has no room for whole gradients, so it has to reduce them after every micro-batch.",
        options=("stage 1", "stage 2", "both the same"),
    ),
}

LESSON = Lesson(
    objectives=(
        "compute what each rank holds at each stage of ZeRO, by the paper's formula and from the shapes",
        "say which rank owns what, and what padding costs",
        "compute what each rank sends in a step, with gradient accumulation",
        "choose the lowest stage that fits, and say what its memory does not include",
    ),
    minutes=90,
    predictions=PREDICTIONS,
    exercises=(STATE_BYTES, PARTITION, OWNERS_OF_TENSORS, TRAFFIC, SMALLEST_STAGE),
    misconceptions=(
        "That half precision halves the states. The master copy takes what parameters and gradients save.",
        "That a higher stage is better. It sends more, and a lower one that fits is enough.",
        "That ZeRO splits activations. They depend on the batch of each rank, and stay whole.",
        "That stage 3 always holds the least. Its buckets may be larger than a small model.",
    ),
)
