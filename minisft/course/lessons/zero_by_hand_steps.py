"""The three steps of lesson 07, and what they are compared with.

They run on two real processes (`two_ranks`). Expected results come from paper, from PyTorch's AdamW
in one process, and from live DeepSpeed engines, bit for bit.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.experiments.by_hand import RANKS, Task, character_rows, pytorch_adamw
from minisft.course.experiments.live_stages import live_stages
from minisft.course.experiments.two_ranks import Trained, run
from minisft.course.experiments.zero_steps import zero1_step, zero2_step, zero3_step

TEXT = "what does zero cut? the optimizer's averages, then the gradients, and at last the weights."


def _compared(trained: Trained, task: Task, stage: int) -> dict[str, Any]:
    """The part of a result that has to be right, in the order in which a learner should read it."""
    gradient, weights = trained.gradient, trained.weights
    if task.sizes:
        result: dict[str, Any] = {"gradient that AdamW received": gradient}
    else:
        most = max(held["gradients"] for held in trained.bytes)
        result = {"gradient kept": "whole" if most >= 4 * len(weights) else "in part", "losses": trained.losses}
    if stage == 3 and not task.sizes:
        result["all layers whole at once"] = trained.whole_layers >= len(task.model(0, 0).layers)
    result["bytes of AdamW's averages, by rank"] = [held["averages"] for held in trained.bytes]
    result["same weights on both ranks"] = trained.same
    result["weights"] = weights if task.digits < 0 else [round(weight, task.digits) for weight in weights]
    return result


def _on_paper(gradient: list[float], weights: list[float], averages: int) -> dict[str, Any]:
    return {
        "gradient that AdamW received": gradient,
        "bytes of AdamW's averages, by rank": [averages] * RANKS,
        "same weights on both ranks": True,
        "weights": weights,
    }


def _of_pytorch(task: Task, stage: int) -> dict[str, Any]:
    """What AdamW computes in one process from the mean of the ranks' slopes."""
    weights = torch.nn.Parameter(task.start())
    optimizer = pytorch_adamw([weights])
    for data in task.data:
        gradient = weights.grad = torch.tensor(data).mean(0)
        optimizer.step()
    cut = task.sizes if stage == 3 else (sum(task.sizes),)
    return _on_paper(gradient.tolist(), weights.tolist(), 8 * sum(-(-size // RANKS) for size in cut))


def _of_deepspeed(task: Task, stage: int) -> dict[str, Any]:
    """What live engines compute; their step counter, 4 bytes, is not counted."""
    live = live_stages(task)[stage]
    return {
        "gradient kept": "whole" if stage == 1 else "in part",
        "losses": live["losses"],
        **({"all layers whole at once": False} if stage == 3 else {}),
        "bytes of AdamW's averages, by rank": [held["optimizer states"] - 4 for held in live["bytes"]],
        "same weights on both ranks": True,
        "weights": live["weights"],
    }


def _step_cases(stage: int, draw: random.Random) -> Iterator[Case]:
    one = Task([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]], (3,), digits=4)
    expected = _on_paper([2.0] * 3, [0.9899, 1.9898, 2.9897], 16)
    yield Case((one,), expected, "the weights 1, 2, 3 with the gradients 1, 2, 3 and 3, 2, 1 on the two ranks")
    two = Task([[[3.0] * 4, [1.0] * 4]] * 2, (2, 2), digits=4)
    expected = _on_paper([2.0] * 4, [0.9798, 1.9796, 2.9794, 3.9792], 16)
    yield Case((two,), expected, "two steps of two layers, with the gradient 3 on rank 0 and 1 on rank 1")
    opposed = Task([[[1.0] * 5, [-1.0] * 5]], (2, 3), digits=4)
    expected = _on_paper([0.0] * 5, [0.9999, 1.9998, 2.9997, 3.9996, 4.9995], 24)
    yield Case((opposed,), expected, "gradients that cancel, so that the weights only decay")
    rows = character_rows(TEXT)
    batches = [[rows[i : i + 8], rows[i + 8 : i + 16]] for i in range(0, 80, 16)]
    real = Task(batches)
    yield Case((real,), _of_deepspeed(real, stage), "five steps of the character model, beside DeepSpeed's engine")
    for _ in range(3):
        sizes = tuple(draw.randint(1, 7) for _ in range(draw.randint(2, 4)))
        draws = [[[draw.randint(-40, 40) / 8 for _ in range(sum(sizes))] for _ in "01"] for _ in "012"]
        task = Task(draws, sizes)
        yield Case((task,), _of_pytorch(task, stage))


def _run_stage(stage: int, functions: Sequence[Callable[..., Any]], cases: Sequence[Case]) -> list[list[Any]]:
    tasks = [case.arguments[0] for case in cases]
    rows = run(functions, tasks, sharded=stage == 3)
    return [
        [x if isinstance(x, Exception) else _compared(x, task, stage) for x, task in zip(row, tasks, strict=True)]
        for row in rows
    ]


def _edited(function: Callable[..., Any], *edits: tuple[str, str]) -> Callable[..., Any]:
    """Return `function` with passages of its source replaced: the same step with a mistake in it."""
    source = inspect.getsource(function)
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    space = dict(function.__globals__)
    exec(source, space)  # noqa: S102 - the lesson's own source
    mistaken = space[function.__name__]
    mistaken.edited_source = source
    return mistaken


GATHER = "    dist.all_gather_single(weights, mine.clone())\n"
SUMMED = (
    "The ranks' gradients are summed and not averaged: divide by the number of ranks. AdamW almost hides it, because "
    "it divides by the gradient's own size; clipping and other optimizers do not."
)
OWN_ROWS = "The other ranks' gradients never arrive: each slice is stepped with the gradient of one rank's rows only."
NOT_GATHERED = (
    "The updated slices are not gathered: each rank keeps old weights in the other's slice, and the models diverge."
)
STEP_STUCK = (
    "AdamW gets the same step number every time. Its bias correction then treats every step as the first one, "
    "and the weights move too far."
)

ZERO1 = Exercise(
    name="07.zero1",
    answer=zero1_step,
    cases=partial(_step_cases, 1),
    run=partial(_run_stage, 1),
    mistakes=(
        Mistake(SUMMED, _edited(zero1_step, ("    gradient /= world\n", ""))),
        Mistake(
            OWN_ROWS, _edited(zero1_step, ("    dist.all_reduce(gradient)\n", ""), ("    gradient /= world\n", ""))
        ),
        Mistake(
            "Every rank keeps AdamW's averages of all weights: the weights are right, but nothing is saved.",
            _edited(zero1_step, ("adamw(mine, gradient.chunk(world)[rank],", "adamw(weights, gradient,")),
        ),
        Mistake(NOT_GATHERED, _edited(zero1_step, (GATHER, ""))),
        Mistake(STEP_STUCK, _edited(zero1_step, ('    state["step"] += 1\n', '    state["step"] = 1\n'))),
        Mistake(
            "A slice of the weights is stepped with the gradient of the other rank's slice: cut both alike.",
            _edited(zero1_step, ("gradient.chunk(world)[rank]", "gradient.chunk(world)[1 - rank]")),
        ),
        Mistake(
            "The gradient is divided twice by the number of ranks.",
            _edited(zero1_step, ("gradient /= world", "gradient /= world * world")),
        ),
    ),
    hints=(
        "Pad the gradient, all-reduce it, divide; step your slice of the weights; then gather the slices of all ranks.",
        "weights.chunk(world)[rank] is a view, so adamw updates the weights themselves; "
        "dist.all_gather_single(weights, mine.clone()) fills in the other slice.",
    ),
    minutes=20,
    ask_next="Which of the bytes that the all-reduce delivers does a rank never use?",
)

ZERO2 = Exercise(
    name="07.zero2",
    answer=zero2_step,
    cases=partial(_step_cases, 2),
    run=partial(_run_stage, 2),
    mistakes=(
        Mistake(SUMMED, _edited(zero2_step, ("part / world", "part"))),
        Mistake(
            OWN_ROWS,
            _edited(zero2_step, ("                dist.reduce(part, dst=owner)\n", ""), ("part / world", "part")),
        ),
        Mistake(
            "The whole gradient is kept until the optimizer steps, as at stage 1: reduce each layer's to its owner "
            "inside the loop, and keep only your slice.",
            _edited(
                zero2_step,
                ("torch.zeros(size)", "torch.zeros(world * size)"),
                ("dist.reduce(part, dst=owner)", "dist.all_reduce(part)"),
                ("if rank == owner", "if True"),
                ("kept[begin - owner * size : end - owner * size]", "kept[begin:end]"),
                ("adamw(mine, kept,", "adamw(mine, kept.chunk(world)[rank],"),
            ),
        ),
        Mistake(
            "Each part is written at the start of the slice: place it where its weights are, counted from the start of "
            "your slice.",
            _edited(zero2_step, ("kept[begin - owner * size : end - owner * size]", "kept[: end - begin]")),
        ),
        Mistake(NOT_GATHERED, _edited(zero2_step, (GATHER, ""))),
        Mistake(STEP_STUCK, _edited(zero2_step, ('    state["step"] += 1\n', '    state["step"] = 1\n'))),
    ),
    hints=(
        "For each layer and each owner, cut out what of the layer's gradient lies in the owner's slice, and reduce it.",
        "begin = max(first, owner * size) and end = min(first + len(gradient), (owner + 1) * size): reduce "
        "gradient[begin - first : end - first] to the owner if begin < end.",
    ),
    minutes=25,
    ask_next="A layer of which a rank owns nothing: what does that rank still have to do, and why?",
)

ZERO3 = Exercise(
    name="07.zero3",
    answer=zero3_step,
    cases=partial(_step_cases, 3),
    run=partial(_run_stage, 3),
    mistakes=(
        Mistake(SUMMED, _edited(zero3_step, ("gradients[i] / world", "gradients[i]"))),
        Mistake(
            OWN_ROWS,
            _edited(
                zero3_step,
                (
                    "dist.reduce_scatter_single(gradients[i], padded)",
                    "gradients[i] = padded.chunk(world)[dist.get_rank()].clone()",
                ),
                ("gradients[i] / world", "gradients[i]"),
            ),
        ),
        Mistake(
            "The step counter grows with every layer. It counts optimizer steps: all layers share one number.",
            _edited(
                zero3_step,
                ('    state["step"] += 1\n', ""),
                ("enumerate(slices):\n", 'enumerate(slices):\n        state["step"] += 1\n'),
            ),
        ),
        Mistake(
            "All gathered layers stay in memory, so a rank holds the whole model after all: gather a layer, use it, "
            "and let it go; backward gathers it again.",
            _edited(
                zero3_step,
                ("    inputs,", "    layers = [gathered(i) for i in range(len(slices))]\n    inputs,"),
                ("layer.forward(gathered(i), x)", "layer.forward(layers[i], x)"),
                (".backward(gathered(i),", ".backward(layers[i],"),
            ),
        ),
        Mistake(
            "The whole gradient of every layer is kept: reduce-scatter it, and keep only your slice.",
            _edited(
                zero3_step,
                ("dist.reduce_scatter_single(gradients[i], padded)", "gradients[i] = padded"),
                (
                    "adamw(mine, gradients[i] / world,",
                    "dist.all_reduce(gradients[i])\n        gradients[i] /= world\n"
                    "        adamw(mine, gradients[i].chunk(world)[dist.get_rank()],",
                ),
            ),
        ),
        Mistake(STEP_STUCK, _edited(zero3_step, ('    state["step"] += 1\n', '    state["step"] = 1\n'))),
    ),
    hints=(
        "Write a small function that gathers layer i and cuts off the padding; call it in both loops.",
        "Keep each layer's input in a list. Backward goes from the last layer to the first: gather, layer.backward, "
        "pad, dist.reduce_scatter_single(slice, padded). Then step all slices with one step number.",
    ),
    minutes=30,
    ask_next="Which layer's gather could be started while another layer still computes?",
)
