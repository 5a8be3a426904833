"""Lesson 07: ZeRO, written by hand and compared with DeepSpeed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.lessons.zero_by_hand_steps import ZERO1, ZERO2, ZERO3
from minisft.course.predictions import Choice, Number


def all_reduce(parts: list) -> tuple[list, list]:
    """Return (scattered, gathered): what each rank holds after the halves.

    `parts[r]` are the numbers of rank r, a list; all have the same length.
    Reduce-scatter: cut the places into one piece per rank (rounded up, so that the
    last may be short); `scattered[r]` is the sum over all ranks of piece r.
    All-gather: `gathered[r]` is every piece, in order, on every rank.
    """
    world = len(parts)
    size = -(-len(parts[0]) // world)
    scattered = []
    for rank in range(world):
        pieces = [part[rank * size : (rank + 1) * size] for part in parts]
        scattered.append([sum(numbers) for numbers in zip(*pieces, strict=True)])
    whole = [number for piece in scattered for number in piece]
    return scattered, [list(whole) for _ in range(world)]


def _all_reduce_cases(draw: random.Random) -> Iterator[Case]:
    yield Case(([[1, 2], [30, 40]],), ([[31], [42]], [[31, 42]] * 2), "two ranks with two numbers each")
    three = [[1, 2, 3], [10, 20, 30]]
    yield Case((three,), ([[11, 22], [33]], [[11, 22, 33]] * 2), "three numbers on two ranks, which do not divide")
    yield Case(([[5, 6]],), ([[5, 6]], [[5, 6]]), "one rank alone")
    for _ in range(8):
        world, length = draw.randint(2, 5), draw.randint(5, 12)
        parts = [[draw.randint(-9, 9) for _ in range(length)] for _ in range(world)]
        pieces = torch.tensor(parts).sum(0).split(-(-length // world))
        scattered = [piece.tolist() for piece in pieces] + [[]] * (world - len(pieces))
        yield Case((parts,), (scattered, [torch.tensor(parts).sum(0).tolist()] * world))


def _cut_down(parts: list[list[int]]) -> Any:
    size = len(parts[0]) // len(parts)
    return all_reduce([part[: size * len(parts)] for part in parts])


def _own_piece(parts: list[list[int]]) -> Any:
    size = -(-len(parts[0]) // len(parts))
    own = [part[rank * size : (rank + 1) * size] for rank, part in enumerate(parts)]
    return own, [[number for piece in own for number in piece]] * len(parts)


ALL_REDUCE = Exercise(
    name="07.all_reduce",
    answer=all_reduce,
    cases=_all_reduce_cases,
    mistakes=(
        Mistake(
            "The numbers are averaged. An all-reduce sums; whoever wants an average divides afterwards.",
            lambda parts: [[[number / len(parts) for number in row] for row in half] for half in all_reduce(parts)],
        ),
        Mistake(
            "Each rank keeps its own piece without adding the other ranks' numbers: that scatters and reduces nothing.",
            _own_piece,
        ),
        Mistake(
            "The second half is missing: after the all-gather every rank holds all pieces, and not only its own.",
            lambda parts: (all_reduce(parts)[0], all_reduce(parts)[0]),
        ),
        Mistake(
            "The places that do not divide are lost: round the size of a piece up, and let the last one be short.",
            _cut_down,
        ),
        Mistake(
            "All ranks hold the whole sum after the reduce-scatter already. It leaves each rank one piece of it.",
            lambda parts: (all_reduce(parts)[1], all_reduce(parts)[1]),
        ),
    ),
    hints=(
        "Work out the size of a piece first, rounded up; then piece r is a slice of every part.",
        "size = -(-len(parts[0]) // world); zip(*pieces) pairs the numbers of one place; then join the sums.",
    ),
    minutes=10,
    ask_next="How many numbers does each rank send if the pieces travel around a ring?",
)


LESSON = Lesson(
    objectives=(
        "build an all-reduce from a reduce-scatter and an all-gather",
        "write ZeRO-1, ZeRO-2 and ZeRO-3 for two real processes, in under 80 lines together",
        "show that weights equal DeepSpeed's to the last bit, and say what this finds that a loss hides",
        "say what each rank holds and sends at each stage",
    ),
    minutes=120,
    predictions={
        "one_process": Choice(
            asks="one process with all rows, and two with half of the rows each: how the weights compare",
            stand_in="equal to the last bit",
            options=("equal to the last bit", "equal up to rounding", "different models"),
            lesson="Cutting the rows changes the order of additions, and floating-point addition depends on the order.",
        ),
        "bits": Choice(
            asks="weights by hand and by DeepSpeed, on the same two halves of the rows",
            stand_in="equal up to rounding",
            options=("equal to the last bit", "equal up to rounding", "different models"),
            lesson="With the same cut of the rows, every number is computed by the same operations in the same order.",
        ),
        "averages": Number(
            asks="bytes of AdamW's averages on each of two ranks at stage 1",
            stand_in=8_080,
            unit="bytes",
            lesson="AdamW keeps two averages of each weight, 8 bytes in fp32, and the slice is padded.",
        ),
        "sends": Choice(
            asks="what the stage 2 step sends, compared with the stage 1 step",
            stand_in="more",
            options=("less", "the same", "more"),
            lesson="An all-reduce delivers every rank the whole sum; a rank that owns one slice needs only that slice.",
        ),
        "gathers": Number(
            asks="all-gathers in one step at stage 3, for a model of four layers",
            stand_in=4,
            unit="all-gathers",
            lesson="A layer is gathered for forward, released, and gathered again for backward.",
        ),
        "summed": Choice(
            asks="what happens to the loss when gradients are summed instead of averaged",
            stand_in="it falls about twice as fast",
            options=("it falls about twice as fast", "it diverges", "it hardly changes"),
            lesson="AdamW divides the average of the gradients by their size, so a constant factor cancels.",
        ),
    },
    exercises=(ALL_REDUCE, ZERO1, ZERO2, ZERO3),
    misconceptions=(
        "That ZeRO approximates. Every stage computes the same step as plain data parallelism, to the last bit.",
        "That a stage that cuts more sends more. Up to stage 2 it sends no more than an all-reduce of the gradients.",
        "That a loss curve proves an implementation right. A sum instead of a mean hardly changes it under AdamW.",
    ),
)
