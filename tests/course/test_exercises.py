import random

import numpy as np
import pytest
import torch

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.values import equal, first_difference, normalized


def double(numbers):
    """Return twice each of `numbers`."""
    return [2 * n for n in numbers]


def cases(draw: random.Random):
    yield Case(([1, 2],), [2, 4], "the numbers 1 and 2")
    yield Case(([3, 4, 5],), [6, 8, 10])


EXERCISE = Exercise(
    name="00.double",
    answer=double,
    cases=cases,
    mistakes=(Mistake("That is the square.", lambda numbers: [n * n for n in numbers]),),
    hints=("Multiply.", "By two."),
    minutes=1,
    ask_next="And four times?",
)


@pytest.mark.parametrize(
    ("answer", "ok", "says"),
    [
        (None, None, "Not attempted"),
        (..., None, "Not attempted"),
        ([2, 4], False, "Give the function itself"),
        (lambda numbers: None, False, "returns nothing for the numbers 1 and 2"),
        (
            lambda numbers: [n * n for n in numbers],
            False,
            "That is the square. Found with: the numbers 1 and 2: [1, 2]",
        ),
        (lambda numbers: numbers, False, "entry 0 is 1, and 2 is expected"),
        (lambda numbers: [2], False, "it has 1 entries, and 2 are expected"),
        (lambda numbers: 1 / 0, False, "raised ZeroDivisionError in the line"),
        (lambda numbers: torch.tensor(numbers) * 2, True, "Right: 2 of 2 cases agree, 1 of them made by hand"),
        (lambda numbers: np.array(numbers) * 2.0, True, "Right"),
        (lambda numbers: tuple(2 * n for n in numbers), True, "Right"),
    ],
)
def test_not_attempted_raised_wrong_and_right_are_told_apart(answer, ok, says):
    shown = EXERCISE.check(answer)
    assert shown.ok is ok and says in shown.text, shown.text


def test_an_answer_that_changes_its_arguments_changes_no_case():
    def greedy(numbers):
        result = [2 * n for n in numbers]
        numbers.clear()
        return result

    assert EXERCISE.check(greedy).ok and EXERCISE.check(greedy).ok


def test_a_grader_sees_an_error_unless_the_answer_is_right(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert EXERCISE.check(double) is None  # a value would be read as points
    for answer in (None, lambda numbers: numbers):
        with pytest.raises(AssertionError, match="Not"):
            EXERCISE.check(answer)


def test_two_hints_then_the_solution():
    assert [EXERCISE.hint().text[:9] for _ in range(3)] == ["Multiply.", "By two. e", "By two. e"]
    assert "2 * n" in EXERCISE.solution().data and "2 * n" not in EXERCISE.stub()


def test_a_message_shows_a_learners_text_and_runs_none_of_it():
    shown = EXERCISE.check(lambda numbers: "<script>alert(1)</script>\x1b]0;x\x07")
    assert "<script>" not in shown._repr_html_() and "\x1b" not in repr(shown)


@pytest.mark.parametrize(
    ("given", "expected", "options"),
    [
        ((1, 2), [1, 2], {}),
        ({2, 1}, [1, 2], {"ordered": False}),
        ([2, 1], {1, 2}, {"ordered": False}),
        (torch.tensor([[1.0]]), [[1]], {}),
        (np.float32(0.1), 0.1, {"tolerance": 1e-6}),
        ({"a": (1,)}, {"a": [1]}, {}),
    ],
)
def test_containers_do_not_matter(given, expected, options):
    assert equal(normalized(given), normalized(expected), **options)


@pytest.mark.parametrize(
    ("given", "expected"), [([1, 2], [2, 1]), ([1], [1, 1]), ("1", 1), (True, 1), (None, 0), ({1}, [1, 1])]
)
def test_what_differs_is_told(given, expected):
    assert not equal(given, expected, ordered=True)
    assert first_difference(given, expected)
