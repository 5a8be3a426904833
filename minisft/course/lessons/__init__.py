"""The predictions and exercises of each notebook: one module per notebook, named after it.

A lesson module defines `LESSON`. Its notebook calls `predict`, `reveal`, `exercise` and `review`
with the names that it defines; `tests/course/lessons` plants wrong and right answers for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.course.exercises import Exercise
    from minisft.course.predictions import Prediction

MODULES = {
    "00": "start_here",
    "01": "chat_templates",
    "02": "label_masking",
    "03": "zero_memory",
    "04": "launch_zero",
    "05": "evaluate",
    "06": "scale_out",
    "07": "zero_by_hand",
}


@dataclass(frozen=True)
class Lesson:
    """What a notebook asks of its learner, and what its teacher should know."""

    objectives: tuple[str, ...]  # "you will be able to …"
    minutes: int  # to read and do it, exercises included
    predictions: Mapping[str, Prediction] = field(default_factory=dict)  # by key, without the number
    exercises: tuple[Exercise, ...] = ()
    misconceptions: tuple[str, ...] = ()  # what learners often believe, and what is true


def lesson_of(number: str) -> Lesson:
    """Return the lesson of notebook `number`, for example "03". Raises `UserError` for another one."""
    if number not in MODULES:
        raise UserError(f"there is no notebook {number!r}: the course has {', '.join(MODULES)}")
    lesson = importlib.import_module(f"minisft.course.lessons.{MODULES[number]}").LESSON
    assert isinstance(lesson, Lesson)
    return lesson
