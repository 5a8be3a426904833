"""Functions for the learner to write, and checkers that say what is wrong with them.

    exercise("02.labels").check(my_labels)
    exercise("02.labels").hint()
    exercise("02.labels").solution()

A checker runs the function on cases made by hand and on random ones, and compares it with the
package. Where an answer is wrong, it is compared with functions that make the plausible mistakes:
the one that gives the same answers says what went wrong.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.course.shown import Shown
from minisft.course.values import equal, first_difference, normalized, short
from minisft.text import one_line

GRADING = "NBGRADER_EXECUTION"  # set by nbgrader: a wrong answer then has to raise
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"  # nbgrader removes what is between them


@dataclass(frozen=True)
class Case:
    """The arguments of one call, the expected result, and how to call the case in a sentence."""

    arguments: tuple[Any, ...]
    expected: Any
    name: str = ""  # empty for a random case


# Calls each function on each case; returns one list per function, of results or exceptions raised.
Run = Callable[[Sequence[Callable[..., Any]], Sequence[Case]], list[list[Any]]]


class RaisedElsewhere(Exception):
    """What a function raised in another process: the kind of exception, its message, and the line."""

    def __init__(self, kind: str, message: str, line: str = ""):
        super().__init__(message)
        self.kind, self.line = kind, line


@dataclass(frozen=True)
class Mistake:
    """A plausible mistake: a function that makes it, and the sentence that a learner needs then."""

    sentence: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One function to write.

    `cases` draws the cases, those made by hand (with a name) first; their expected results come
    from the package, from a library, or from paper, never from `answer`, the solution. `explain`
    may say more about wrong answers than the mistakes do: it receives the failed cases with what
    was returned, and returns a sentence, or "" to leave it to the mistakes. `run`
    calls functions elsewhere than in this process.
    """

    name: str  # number of the notebook and a key: "02.labels"
    answer: Callable[..., Any]
    cases: Callable[[random.Random], Iterator[Case]]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str]
    minutes: int
    ask_next: str  # for the teacher: what to ask those who are done
    tolerance: float = 0.0
    ordered: bool = True
    explain: Callable[[list[tuple[Case, Any]]], str] | None = None
    run: Run | None = None

    def check(self, function: Callable[..., Any] | None) -> Shown | None:
        """Run `function` on all cases; tell not attempted, raised, wrong and right apart.

        Where nbgrader grades, this raises `AssertionError` unless the answer is right, and returns
        nothing, because nbgrader reads the value of a cell as its points.
        """
        shown = self._verdict(function)
        if not os.environ.get(GRADING):
            return shown
        if not shown.ok:
            raise AssertionError(shown.text)
        return None

    def hint(self) -> Shown:
        """Show the first hint, and the second when asked again."""
        given = _hints_given[self.name] = _hints_given.get(self.name, 0) + 1
        text = self.hints[min(given, len(self.hints)) - 1]
        more = "Ask again for the second hint." if given == 1 else f'exercise("{self.name}").solution() shows one.'
        return Shown(f"{text} {more}")

    def solution(self) -> Any:
        """Show one way to write it."""
        from IPython.display import Code

        return Code(self.source(), language="python")

    def source(self) -> str:
        """The source of the solution."""
        return textwrap.dedent(inspect.getsource(self.answer))

    def stub(self) -> str:
        """What the learner starts from: the signature and docstring of the solution."""
        head, _ = _head_and_body(self.answer)
        return f"{head}    raise NotImplementedError  # your turn\n"

    def marked_source(self) -> str:
        """The solution with nbgrader's marks around what the learner writes."""
        head, body = _head_and_body(self.answer)
        return f"{head}    {BEGIN}\n{body.rstrip()}\n    {END}\n"

    def all_cases(self) -> list[Case]:
        return list(self.cases(random.Random(0)))  # noqa: S311

    def _verdict(self, function: Callable[..., Any] | None) -> Shown:
        if function is None or function is ...:
            return Shown("Not attempted yet: write the function above, and run this cell again.")
        if not callable(function):
            return Shown(f"Give the function itself, without calling it, not {short(function)}.", ok=False)
        not_attempted = Shown("Not attempted yet: replace the line that raises NotImplementedError.")
        if hasattr(function, "__code__") and function.__code__.co_names == ("NotImplementedError",):
            return not_attempted  # before the cases, which may take long to compute
        failed: list[tuple[Case, Any]] = []
        cases = self.all_cases()
        results = self._results([function], cases)
        for i, case in enumerate(cases):
            try:
                given = results(0, i)
            except NotImplementedError:
                return not_attempted
            except Exception as error:
                return Shown(_raised(error, function, case), ok=False)
            if not self._equal(given, case.expected):
                failed.append((case, given))
        if failed:
            return Shown(self._what_is_wrong(failed, cases), ok=False)
        by_hand = sum(bool(case.name) for case in cases)
        return Shown(f"Right: {len(cases)} of {len(cases)} cases agree, {by_hand} of them made by hand.", ok=True)

    def _equal(self, given: Any, expected: Any) -> bool:
        return equal(given, normalized(expected), self.tolerance, self.ordered)

    def _what_is_wrong(self, failed: list[tuple[Case, Any]], cases: Sequence[Case]) -> str:
        case, given = failed[0]
        answered = sum(c.expected is not None for c in cases)  # None may be a right answer to the others
        may_be_none = len(failed) < answered < len(cases)
        if all(value is None for _, value in failed) and not may_be_none:
            return f"Not yet: your function returns nothing for {_called(case)}; does it end in `return`?"
        if self.explain and (sentence := self.explain(failed)):
            return f"Not yet: {sentence}"
        results = self._results([mistake.answer for mistake in self.mistakes], [case for case, _ in failed])

        def makes(mistake: int, i: int) -> bool:
            """Whether the mistake gives the same answer to failed case `i`."""
            try:
                return self._equal(results(mistake, i), failed[i][1])
            except Exception:  # a mistaken function may fail where the learner's does not
                return False

        for number, mistake in enumerate(self.mistakes):
            if all(makes(number, i) for i in range(len(failed))):
                return f"Not yet: {mistake.sentence} Found with: {_found_with(case)}."
        difference = first_difference(given, normalized(case.expected), self.tolerance)
        likely = next((m.sentence for number, m in enumerate(self.mistakes) if makes(number, 0)), "")
        return f"Not yet: for {_called(case)}, {difference}.{f' {likely}' if likely else ''}"

    def _results(self, functions: Sequence[Callable[..., Any]], cases: Sequence[Case]) -> Callable[[int, int], Any]:
        """Return what gives the normalized result of function i for case j, or raises what it raised."""
        elsewhere = self.run(functions, cases) if self.run else None

        def result(i: int, j: int) -> Any:
            if elsewhere is None:
                return normalized(functions[i](*copy.deepcopy(cases[j].arguments)))
            if isinstance(elsewhere[i][j], Exception):
                raise elsewhere[i][j]
            return normalized(elsewhere[i][j])

        return result


_hints_given: dict[str, int] = {}


def _head_and_body(function: Callable[..., Any]) -> tuple[str, str]:
    """Split the source of a function into its signature with docstring, and its body."""
    import ast

    source = textwrap.dedent(inspect.getsource(function))
    statements = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    has_docstring = isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant)
    lines = source.splitlines(keepends=True)
    last = statements[0].end_lineno if has_docstring else statements[0].lineno - 1
    return "".join(lines[:last]), "".join(lines[last:])


def _called(case: Case) -> str:
    return case.name or f"the random case {_shown(case.arguments)}"


def _found_with(case: Case) -> str:
    """The name of a case, and its arguments where the name does not contain them."""
    return f"{case.name}: {_shown(case.arguments)}" if case.name else _called(case)


def _shown(arguments: tuple[Any, ...]) -> str:
    return one_line(", ".join(map(short, arguments)), 300)


def _raised(error: Exception, function: Callable[..., Any], case: Case) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    written = inspect.unwrap(function).__code__.co_filename if hasattr(function, "__code__") else ""
    line = next((f.line for f in reversed(frames) if f.filename == written and f.line), "")
    kind = type(error).__name__
    if isinstance(error, RaisedElsewhere):
        kind, line = error.kind, error.line
    where = f" in the line `{line}`" if line else ""
    return f"Your function raised {kind}{where}: {one_line(error, 200)}, for {_called(case)}."
