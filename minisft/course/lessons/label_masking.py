"""Lesson 02: which tokens the loss sees."""

from __future__ import annotations

import random
from collections.abc import Iterator

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.predictions import Number
from minisft.labels.encode_row import IGNORE_INDEX

Piece = tuple[str, list[int]]  # who wrote it ("user", "assistant", "bos" or "eos"), and its token ids


def labels_of(pieces: list[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one row.

    `pieces` are the parts of a conversation in order, as (role, ids). The role is "bos", "user",
    "assistant", or "eos", which follows each answer. Answers are trained with their EOS.
    """
    input_ids, labels = [], []
    for role, ids in pieces:
        input_ids += ids
        labels += ids if role in ("assistant", "eos") else [-100] * len(ids)
    return input_ids, labels


def _label_cases(draw: random.Random) -> Iterator[Case]:
    one = [("bos", [1]), ("user", [10, 11]), ("assistant", [20]), ("eos", [2])]
    yield Case((one,), ([1, 10, 11, 20, 2], [-100, -100, -100, 20, 2]), "one question and its answer")
    two = [*one, ("user", [12]), ("assistant", [21, 22]), ("eos", [2])]
    row = ([1, 10, 11, 20, 2, 12, 21, 22, 2], [-100, -100, -100, 20, 2, -100, 21, 22, 2])
    yield Case((two,), row, "two questions with their answers")
    yield Case(([("bos", [1]), ("user", [2, 20])],), ([1, 2, 20], [-100] * 3), "a question that spells EOS")
    for _ in range(10):
        pieces: list[Piece] = [("bos", [1])]
        for role in ("user", "assistant") * draw.randint(1, 4):
            pieces.append((role, [draw.randint(3, 999) for _ in range(draw.randint(1, 6))]))
            pieces += [("eos", [2])] if role == "assistant" else []
        ids = [i for _, part in pieces for i in part]
        trained = [role in ("assistant", "eos") for role, part in pieces for _ in part]
        yield Case((pieces,), (ids, [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]))


def _relabeled(pieces: list[Piece], *trained: str) -> tuple[list[int], list[int]]:
    """Ids and labels of `pieces` if exactly the roles `trained` were trained."""
    ids = [i for _, part in pieces for i in part]
    return ids, [i if role in trained else IGNORE_INDEX for role, part in pieces for i in part]


def _shifted(pieces: list[Piece]) -> tuple[list[int], list[int]]:
    ids, labels = labels_of(pieces)
    return ids, [*labels[1:], IGNORE_INDEX]


LABELS = Exercise(
    name="02.labels",
    answer=labels_of,
    cases=_label_cases,
    mistakes=(
        Mistake(
            "The EOS after an answer is not trained, so the model would never learn to stop.",
            lambda pieces: _relabeled(pieces, "assistant"),
        ),
        Mistake(
            "Everything is trained, the questions included: the model would learn to write the user's part.",
            lambda pieces: _relabeled(pieces, "bos", "user", "assistant", "eos"),
        ),
        Mistake(
            "BOS is trained. It is never predicted, because nothing comes before it.",
            lambda pieces: _relabeled(pieces, "bos", "assistant", "eos"),
        ),
        Mistake(
            "The labels are shifted by one. The model shifts them itself: each label stays with its own id.", _shifted
        ),
        Mistake(
            "The mask is the wrong way round: the questions are trained and the answers are not.",
            lambda pieces: _relabeled(pieces, "bos", "user"),
        ),
    ),
    hints=(
        "Extend both lists in the same loop, once for each piece.",
        'A piece is trained if its role is "assistant" or "eos"; otherwise add -100 once for each of its ids.',
    ),
    minutes=10,
    ask_next="What would the model learn if only the EOS of the last answer were trained?",
)

LESSON = Lesson(
    objectives=("write the labels of a row by hand, and say why each token is trained or not",),
    minutes=60,
    predictions={
        "divisor": Number(
            asks="the number by which the sum is divided when one of three tokens has the label -100",
            stand_in=3,
            lesson="A masked token is neither in the sum nor in the count.",
        ),
    },
    exercises=(LABELS,),
    misconceptions=("That a masked token is not read. It is: every later token is predicted from it.",),
)
