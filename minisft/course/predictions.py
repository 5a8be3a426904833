"""What a learner may predict: a number, a range, a choice, several choices, or an order.

A lesson lists its predictions (`minisft.course.lessons`); notebooks record and reveal them with
`minisft.course.classroom`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from minisft.text import one_line


@dataclass(frozen=True)
class Prediction:
    """What a learner predicts. Subclasses say which answers are possible and when one is right.

    `asks` names what is predicted, `stand_in` is the usual guess, which executed builds use, and
    `lesson` is what a wrong prediction says about the subject, in one sentence.
    """

    asks: str
    stand_in: Any
    lesson: str

    def wants(self) -> str:
        """Say which answers are possible."""
        raise NotImplementedError

    def accepts(self, answer: Any) -> bool:
        raise NotImplementedError

    def objection(self, answer: Any) -> str:
        """Say what to give in place of an answer that is not accepted."""
        return f"give {self.wants()}, not {one_line(repr(answer), 60)}"

    def distance(self, answer: Any, truth: Any) -> str:
        """Say how far off the answer is; empty if it is right."""
        return "" if answer == truth else "another one"

    def shown(self, answer: Any) -> str:
        return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


@dataclass(frozen=True)
class Number(Prediction):
    """One number, right if it differs from the truth by no more than `within` of the truth."""

    unit: str = ""
    within: float = 0.0

    def wants(self) -> str:
        return f"one number{f' ({self.unit})' if self.unit else ''}"

    def accepts(self, answer: Any) -> bool:
        return isinstance(answer, Real) and not isinstance(answer, bool) and math.isfinite(answer)

    def distance(self, answer: Any, truth: Any) -> str:
        if abs(answer - truth) <= self.within * abs(truth):
            return ""
        if truth and answer * truth > 0 and not 0.5 <= answer / truth <= 2:
            factor = max(answer / truth, truth / answer)
            return f"too {'large' if abs(answer) > abs(truth) else 'small'} by a factor of {factor:,.3g}"
        return f"too {'large' if answer > truth else 'small'} by {self.shown(abs(answer - truth))}"

    def shown(self, answer: Any) -> str:
        digits = f"{answer:,}" if isinstance(answer, int) else f"{answer:,.4g}"
        return f"{digits} {self.unit}".strip()


@dataclass(frozen=True)
class Interval(Number):
    """A range `(low, high)` that should contain the truth; a wide one says little."""

    def wants(self) -> str:
        return f"a range (low, high){f' in {self.unit}' if self.unit else ''}"

    def accepts(self, answer: Any) -> bool:
        return self._is_pair(answer) and answer[0] <= answer[1]

    def objection(self, answer: Any) -> str:
        if self._is_pair(answer):  # the ends are swapped
            return f"the low end comes first: give ({answer[1]}, {answer[0]})"
        return super().objection(answer)

    def distance(self, answer: Any, truth: Any) -> str:
        low, high = answer
        if low <= truth <= high:
            return ""
        return super().distance(low if truth < low else high, truth)

    def shown(self, answer: Any) -> str:
        if not isinstance(answer, list):
            return super().shown(answer)
        return f"{super().shown(answer[0])} to {super().shown(answer[1])}"

    def _is_pair(self, answer: Any) -> bool:
        return isinstance(answer, list) and len(answer) == 2 and all(map(super().accepts, answer))


@dataclass(frozen=True)
class Choice(Prediction):
    """One of `options`."""

    options: tuple[Any, ...] = ()

    def wants(self) -> str:
        return "one of " + ", ".join(map(repr, self.options))

    def accepts(self, answer: Any) -> bool:
        return answer in self.options


@dataclass(frozen=True)
class Several(Choice):
    """Any number of `options`, in any order."""

    def wants(self) -> str:
        return "a list of none, some or all of " + ", ".join(map(repr, self.options))

    def accepts(self, answer: Any) -> bool:
        return isinstance(answer, list | set) and all(item in self.options for item in answer)

    def distance(self, answer: Any, truth: Any) -> str:
        missing = [item for item in truth if item not in answer]
        extra = [item for item in answer if item not in truth]
        parts = [f"not predicted: {self.shown(missing)}"] if missing else []
        return "; ".join(parts + ([f"predicted in vain: {self.shown(extra)}"] if extra else []))

    def shown(self, answer: Any) -> str:
        return ", ".join(str(option) for option in self.options if option in answer) or "none"


@dataclass(frozen=True)
class Order(Choice):
    """All `options` in an order."""

    def wants(self) -> str:
        return "a list that orders all of " + ", ".join(map(repr, self.options))

    def accepts(self, answer: Any) -> bool:
        return isinstance(answer, list) and len(answer) == len(self.options) and all(o in answer for o in self.options)

    def distance(self, answer: Any, truth: Any) -> str:
        place = next((i for i, (a, b) in enumerate(zip(answer, truth, strict=True), 1) if a != b), 0)
        return f"different from place {place} on" if place else ""
