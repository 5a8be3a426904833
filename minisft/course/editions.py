"""Write the editions of the course from the notebooks, which are their one source.

    minisft notebooks --edition student     to do: no outputs, functions to write, predictions open
    minisft notebooks --edition teacher     solutions in nbgrader's marks, minutes, what to ask next

The committed notebooks are the edition to read: executed, with the functions still to be written.
A cell with the tag `exercise` holds the stub of a function, and one with the tag `check` its check;
everything else about them is in the lesson (`minisft.course.lessons`). Both editions carry the
metadata of nbgrader, so that a teacher can release, collect and grade them.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisft.course.classroom import exercise
from minisft.course.exercises import Exercise
from minisft.course.lessons import lesson_of
from minisft.course.notebooks import parsed
from minisft.errors import UserError
from minisft.files import is_same_file, read_text, user_path, written_whole
from minisft.text import say

CHECK = re.compile(r'exercise\("([\w.]+)"\)\.check\(')
TURN = "raise NotImplementedError  # your turn"


def write_edition(root: Path, edition: str, out: Path, overwrite: bool = False) -> list[Path]:
    """Write all notebooks of the course to the folder `out`, as `edition` ("student", "teacher").

    Returns the paths of the notebooks. One that exists is kept, because it may hold a learner's
    work, unless `overwrite` is given. Raises `UserError` for an unknown edition.
    """
    import nbformat

    if edition not in EDITIONS:
        raise UserError(f"there is no edition {edition!r}: choose {' or '.join(EDITIONS)}")
    out = user_path(out).absolute()
    if is_same_file(out, root / "notebooks"):
        raise UserError(f"{out} holds the source of the editions: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    written, kept = [], 0
    for source in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        target = out / source.name
        written.append(target)
        if target.exists() and not overwrite:
            kept += 1
            continue
        nb = EDITIONS[edition](parsed(read_text(source) or "", source))
        _point_to(nb, os.path.relpath(root, out))
        with written_whole(target) as stream:
            stream.write(nbformat.writes(nb).rstrip("\n") + "\n")
    if kept:
        say(f"{kept} of {len(written)} notebooks exist and are kept, with the work in them (--overwrite replaces them)")
    return written


def student_edition(nb: Any) -> Any:
    """Return a copy of notebook `nb` without outputs, ready to be released with nbgrader."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    _add_grading(nb)
    return nb


def teacher_edition(nb: Any) -> Any:
    """Return a copy of notebook `nb` with the solutions, and notes on teaching it."""
    from nbformat.v4 import new_markdown_cell

    nb = student_edition(nb)
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        if name := _checked(cell):
            item, stub = exercise(name), next(c for c in reversed(cells) if "exercise" in _tags(c))
            stub.source = item.marked_source().rstrip()
            cells.append(new_markdown_cell(_notes(item), id=f"notes-{name.replace('.', '-')}"))
    if number := _number(nb):
        cells.insert(1, new_markdown_cell(_lesson_notes(number), id=f"notes-{number}"))
    nb.cells = cells
    return nb


EDITIONS: dict[str, Callable[[Any], Any]] = {"student": student_edition, "teacher": teacher_edition}


def _tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _checked(cell: Any) -> str:
    """The name of the exercise that the cell checks, or an empty text."""
    found = CHECK.search(cell.source) if "check" in _tags(cell) else None
    return found[1] if found else ""


def _number(nb: Any) -> str:
    return next((name.partition(".")[0] for cell in nb.cells if (name := _checked(cell))), "")


def _add_grading(nb: Any) -> None:
    """Add nbgrader's metadata (schema version 3) to each stub and its check: one point each."""
    stub = None
    for cell in nb.cells:
        if "exercise" in _tags(cell):
            stub = cell
        if stub is not None and (name := _checked(cell)):
            common = {"schema_version": 3, "task": False}
            grade_id = name.replace(".", "-")
            answer = {"grade": False, "solution": True, "locked": False, "grade_id": grade_id}
            grade = {"grade": True, "solution": False, "locked": True, "grade_id": f"{grade_id}-check"}
            stub.metadata["nbgrader"] = common | answer
            cell.metadata["nbgrader"] = common | grade | {"points": 1}
            stub = None


def _point_to(nb: Any, root: str) -> None:
    """Rewrite paths that start at the folder above the notebooks, so that they start at `root`."""
    for cell in nb.cells:
        cell.source = cell.source.replace("../launchers/", f"{root}/launchers/")


def _notes(item: Exercise) -> str:
    mistakes = "\n".join(f"- {mistake.sentence}" for mistake in item.mistakes)
    recognized = f"What the check recognizes:\n\n{mistakes}\n\n" if mistakes else ""
    return (
        f"**For the teacher.** {item.minutes} minutes. {recognized}"
        f"First hint: {item.hints[0]} Second hint: {item.hints[1]}\n\nAsk next: {item.ask_next}"
    )


def _lesson_notes(number: str) -> str:
    lesson = lesson_of(number)
    objectives = "\n".join(f"- {objective}" for objective in lesson.objectives)
    beliefs = "\n".join(f"- {belief}" for belief in lesson.misconceptions)
    guesses = "\n".join(f"- {p.asks}: {p.shown(p.stand_in)}" for p in lesson.predictions.values())
    return (
        f"**For the teacher.** {lesson.minutes} minutes with the exercises. Afterwards learners can\n\n{objectives}"
        f"\n\nWhat they often believe:\n\n{beliefs}\n\nUsual guesses at the predictions:\n\n{guesses}"
    )
