"""What a notebook calls: predictions that are made before the result is shown, and exercises.

    predict("03.half", ...)     # the learner replaces the dots
    reveal("03.half", 2 + 2 + 12)
    exercise("03.tokens").check(my_function)
    review("03")                # at the end of the notebook

`reveal` ends its cell while nothing was predicted, so nothing below it in the cell is shown. A
prediction may be changed until the reveal, and not after it. What may be predicted, and what a
wrong prediction says, is in the lesson of the notebook (`minisft.course.lessons`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from types import EllipsisType
from typing import Any

from minisft.course.exercises import Exercise
from minisft.course.lessons import lesson_of
from minisft.course.predictions import Prediction
from minisft.course.shown import Shown
from minisft.course.values import normalized
from minisft.errors import UserError
from minisft.text import harmless

STAND_INS = "MINISFT_STAND_INS"  # set where notebooks are executed with nobody to predict


class PredictFirst(UserError):
    """A reveal without a prediction. Jupyter shows its sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass
class _Entry:
    """What became of one prediction in this kernel."""

    answer: Any
    stand_in: bool
    truth: Any = None
    revealed: bool = False


_entries: dict[str, _Entry] = {}


def predict(name: str, answer: Any | EllipsisType = ...) -> Shown:
    """Record the answer to the prediction `name`, for example "03.half"; dots stand for none yet.

    Returns one sentence to show. An answer of the wrong kind is not recorded.
    """
    prediction = _prediction(name)
    entry = _entries.get(name)
    is_stand_in = answer is ... and bool(os.environ.get(STAND_INS))
    answer = normalized(prediction.stand_in if is_stand_in else answer)
    if entry and entry.revealed:
        return Shown(f"The prediction before the reveal counts, and it was {prediction.shown(entry.answer)}.")
    if answer is ... or answer is None:
        return Shown(f"Not predicted yet: replace the dots by {prediction.wants()}, and run this cell again.")
    if not prediction.accepts(answer):
        return Shown(f"Not recorded: {prediction.objection(answer)}.")
    _entries[name] = _Entry(answer, is_stand_in)
    maker = "The usual guess" if is_stand_in else "Your prediction"
    return Shown(f"{maker} is recorded: {prediction.shown(answer)}.")


def reveal(name: str, truth: Any) -> None:
    """Show what was predicted, what is true, and how far off the prediction was.

    Raises `PredictFirst`, which ends the cell, if nothing was predicted.
    """
    from IPython.display import display

    prediction, entry = _prediction(name), _entries.get(name)
    if entry is None:
        raise PredictFirst(f'Predict first: put your answer into the cell `predict("{name}", ...)` above, and run it.')
    entry.truth, entry.revealed = normalized(truth), True
    distance = prediction.distance(entry.answer, entry.truth)
    predicted = f"{'Usual guess' if entry.stand_in else 'Predicted'}: {prediction.shown(entry.answer)}."
    verdict = "That is right." if not distance else f"True: {prediction.shown(entry.truth)} ({distance})."
    display(Shown(f"{predicted} {verdict}", ok=not distance))


def review(number: str) -> Review:
    """Sum up the predictions of notebook `number`: which were off, and what that says."""
    return Review(number)


def exercise(name: str) -> Exercise:
    """Return the exercise `name`, for example "02.labels". Raises `UserError` for an unknown one."""
    exercises = {item.name: item for item in lesson_of(name.partition(".")[0]).exercises}
    if name not in exercises:
        raise UserError(f"there is no exercise {name!r}: this notebook has {', '.join(exercises)}")
    return exercises[name]


class Review:
    """The table at the end of a notebook."""

    def __init__(self, number: str):
        predictions = {f"{number}.{key}": value for key, value in lesson_of(number).predictions.items()}
        self.rows = [(p, _entries.get(name)) for name, p in predictions.items()]

    def lines(self) -> list[tuple[str, str, str, str]]:
        """One tuple of question, prediction, truth, and what it says, for each prediction."""
        lines = []
        for prediction, entry in self.rows:
            if entry is None or not entry.revealed:
                lines.append((prediction.asks, "–", "–", "not predicted, or not revealed yet"))
                continue
            distance = prediction.distance(entry.answer, entry.truth)
            says = f"{distance}. {prediction.lesson}" if distance else "right"
            lines.append((prediction.asks, prediction.shown(entry.answer), prediction.shown(entry.truth), says))
        return lines

    def __str__(self) -> str:
        lines = self.lines()
        right = sum(line[3] == "right" for line in lines)
        stand_ins = any(entry and entry.stand_in for _, entry in self.rows)
        return f"{right} of {len(lines)} {'usual guesses' if stand_ins else 'predictions'} were right."

    def __repr__(self) -> str:
        return "\n".join([str(self), *(harmless(": ".join(line)) for line in self.lines())])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("asked", "predicted", "true", "what that says"))
        cells = ("".join(f"<td>{escape(harmless(part))}</td>" for part in line) for line in self.lines())
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<p>{escape(str(self))}</p><table><tr>{head}</tr>{rows}</table>"


def _prediction(name: str) -> Prediction:
    number, _, key = name.partition(".")
    predictions = lesson_of(number).predictions
    if key not in predictions:
        raise UserError(f"there is no prediction {name!r}: notebook {number} has {', '.join(predictions)}")
    return predictions[key]
