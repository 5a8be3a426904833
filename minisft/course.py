"""What the exercises need: a check that tells "not attempted" from "wrong", and says where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check(answer: Sequence[Any] | None, expected: Sequence[Any], what: str = "position") -> str:
    """Compare an exercise's answer with what the package computes; returns one sentence to show."""
    if answer is None:
        return "Not attempted yet: replace None and run this cell again."
    if len(answer) != len(expected):
        return f"Not yet: your answer has {len(answer)} entries, and {len(expected)} are expected."
    for i, (mine, right) in enumerate(zip(answer, expected, strict=True)):
        if mine != right:
            return f"Not yet: look at {what} {i}, where you have {mine!r}."
    return f"Right: all {len(expected)} agree."
