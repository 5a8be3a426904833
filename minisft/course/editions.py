"""Write the editions of the course from the notebooks, which are their one source.

    minisft notebooks --edition student     to do: no outputs, functions to write, predictions open
    minisft notebooks --edition teacher     solutions in nbgrader's marks, minutes, what to ask next
    minisft notebooks --edition slides      to show: executed, one slide per cell, notes for the speaker

The committed notebooks are the edition to read: executed, with the functions still to be written.
A cell with the tag `exercise` holds the stub of a function, and one with the tag `check` its check;
everything else about them is in the lesson (`minisft.course.lessons`). The first two editions carry
the metadata of nbgrader, so that a teacher can release, collect and grade them: see
`notebooks/teaching.md`. The Markdown pages beside the notebooks are copied, because notebooks link to
them.
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

ABOVE = re.compile(r"(?<![\w./])\.\./(?=(?:launchers|tests)/)")  # the folder above the notebooks
CHECK = re.compile(r'exercise\("([\w.]+)"\)\.check\(')
HEADING = re.compile("#{1,6} ")
SECTION = re.compile("##? ")  # the title or a section: these begin a slide to the right
NOTES = "teacher"  # tag of the notes for the teacher, which nbgrader removes from what it releases
SLIDE_LINES = 16


def write_edition(root: Path, edition: str, out: Path, overwrite: bool = False) -> list[Path]:
    """Write all notebooks of the course, and its Markdown pages, to the folder `out`.

    `edition` is "student", "teacher" or "slides". Returns the paths of the notebooks. A file that
    exists is kept, because it may hold a learner's work, unless `overwrite` is given. Raises
    `UserError` for an unknown edition.
    """
    import nbformat

    if edition not in EDITIONS:
        raise UserError(f"there is no edition {edition!r}: choose {' or '.join(EDITIONS)}")
    out = user_path(out).absolute()
    if is_same_file(out, root / "notebooks"):
        raise UserError(f"{out} holds the source of the editions: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    above = os.path.relpath(root, out)
    written, kept = [], 0
    for source in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        target = out / source.name
        written.append(target)
        if target.exists() and not overwrite:
            kept += 1
            continue
        nb = EDITIONS[edition](parsed(read_text(source) or "", source))
        for cell in nb.cells:
            cell.source = _pointing_to(cell.source, above)
        with written_whole(target) as stream:
            stream.write(nbformat.writes(nb).rstrip("\n") + "\n")
    for source in sorted((root / "notebooks").glob("*.md")):
        if overwrite or not (out / source.name).exists():
            with written_whole(out / source.name) as stream:
                stream.write(_pointing_to(read_text(source) or "", above))
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
    nb = student_edition(nb)
    for name, stub, _ in _exercises(nb):
        stub.source = exercise(name).marked_source().rstrip()
    _add_notes(nb)
    return nb


def slides_edition(nb: Any) -> Any:
    """Return a copy of notebook `nb` to show with `jupyter nbconvert --to slides`.

    A title or section begins a slide to the right, and every other cell one below it. Long prose is
    split between paragraphs. The notes for the teacher become speaker notes.
    """
    nb = copy.deepcopy(nb)
    nb.cells = [part for cell in nb.cells for part in _parts(cell)]
    for cell in nb.cells:
        is_section = cell.cell_type == "markdown" and SECTION.match(cell.source)
        cell.metadata["slideshow"] = {"slide_type": "slide" if is_section else "subslide"}
    _add_notes(nb)
    for cell in nb.cells:
        if NOTES in _tags(cell):
            cell.metadata["slideshow"] = {"slide_type": "notes"}
    return nb


EDITIONS: dict[str, Callable[[Any], Any]] = {
    "student": student_edition,
    "teacher": teacher_edition,
    "slides": slides_edition,
}


def _add_notes(nb: Any) -> None:
    """Insert the notes for the teacher: on the lesson after the title, on each exercise after its check."""
    from nbformat.v4 import new_markdown_cell

    tags = {"tags": [NOTES]}
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        if name := _checked(cell):
            note_id = f"notes-{name.replace('.', '-')}"
            cells.append(new_markdown_cell(_notes(exercise(name)), id=note_id, metadata=tags))
    for name, *_ in _exercises(nb)[:1]:
        number = name.partition(".")[0]
        cells.insert(1, new_markdown_cell(_lesson_notes(number), id=f"notes-{number}", metadata=tags))
    nb.cells = cells


def _parts(cell: Any) -> list[Any]:
    """Split a Markdown cell before its headings, and where it would fill more than one slide."""
    from nbformat.v4 import new_markdown_cell

    if cell.cell_type != "markdown":
        return [cell]
    slides: list[list[str]] = []
    for block in _blocks(cell.source):
        lines = sum(_height(part) for part in slides[-1]) if slides else 0
        is_full = lines and lines + _height(block) > SLIDE_LINES and not HEADING.match(slides[-1][-1])
        if not slides or HEADING.match(block) or is_full:
            slides.append([])
        slides[-1].append(block)
    texts = ["\n\n".join(blocks) for blocks in slides]
    return [new_markdown_cell(text, id=f"{cell.id[:56]}-{i}") for i, text in enumerate(texts)]


def _blocks(source: str) -> list[str]:
    """The paragraphs, lists, tables and headings of Markdown; fenced code and `<details>` stay whole."""
    blocks: list[str] = []
    lines: list[str] = []
    is_open = False
    for line in [*source.splitlines(), ""]:
        is_open ^= line.lstrip().startswith("```")
        is_open = (is_open or "<details" in line) and "</details>" not in line
        starts = bool(HEADING.match(line)) and not is_open
        if lines and not is_open and (starts or not line.strip()):
            blocks.append("\n".join(lines))
            lines = []
        if line.strip() or is_open:
            lines.append(line)
        if starts:  # a heading is a block, even with prose right below it
            blocks.append(lines.pop())
    return [*blocks, "\n".join(lines)] if lines else blocks


def _height(block: str) -> int:
    """Lines of a slide that the block fills, about: headings and tables have taller ones."""
    lines = block.splitlines()
    return sum(2 if line.startswith(("#", "|")) else 1 for line in lines) + 1


def _tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _checked(cell: Any) -> str:
    """The name of the exercise that the cell checks, or an empty text."""
    found = CHECK.search(cell.source) if "check" in _tags(cell) else None
    return found[1] if found else ""


def _exercises(nb: Any) -> list[tuple[str, Any, Any]]:
    """The exercises of `nb`, as (name, cell of the stub, cell of its check)."""
    found, stub = [], None
    for cell in nb.cells:
        if "exercise" in _tags(cell):
            stub = cell
        if stub is not None and (name := _checked(cell)):
            found.append((name, stub, cell))
            stub = None
    return found


def _add_grading(nb: Any) -> None:
    """Add nbgrader's metadata (schema version 3) to each stub and its check: one point each."""
    common = {"schema_version": 3, "task": False}
    for name, stub, check in _exercises(nb):
        grade_id = name.replace(".", "-")
        answer = {"grade": False, "solution": True, "locked": False, "grade_id": grade_id}
        grade = {"grade": True, "solution": False, "locked": True, "grade_id": f"{grade_id}-check", "points": 1}
        stub.metadata["nbgrader"] = common | answer
        check.metadata["nbgrader"] = common | grade


def _pointing_to(text: str, root: str) -> str:
    """Rewrite paths that start at the folder above the notebooks, so that they start at `root`."""
    return ABOVE.sub(lambda _: f"{root}/", text)


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
