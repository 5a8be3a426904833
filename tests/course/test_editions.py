"""The editions of the course, as `minisft notebooks --edition` writes them."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minisft.course.classroom import exercise
from minisft.course.editions import EDITIONS, write_edition
from minisft.errors import UserError


@pytest.fixture
def root(tmp_path):
    """A course of one notebook with one exercise."""
    (tmp_path / "notebooks").mkdir()
    answer = new_output("stream", text="the answer")
    stub = new_code_cell(exercise("02.labels").stub().rstrip(), metadata={"tags": ["exercise"]}, outputs=[answer])
    check = new_code_cell('exercise("02.labels").check(labels_of)', metadata={"tags": ["check"]})
    train = new_code_cell("%%bash\n../launchers/run_zero.sh 1 --data ../tests/x.json --out ../../y")
    cells = [new_markdown_cell("# Title"), stub, check, train]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "02_masking.ipynb")
    return tmp_path


def test_a_student_gets_no_output_and_no_solution(root, tmp_path):
    (path,) = write_edition(root, "student", tmp_path / "outputs" / "course" / "student")
    text, nb = path.read_text(), nbformat.read(path, as_version=4)
    assert "the answer" not in text and "SOLUTION" not in text and "your turn" in text
    assert nb.cells[1].metadata.nbgrader.solution and nb.cells[2].metadata.nbgrader.points == 1
    assert (
        "../../../launchers/run_zero.sh 1 --data ../../../tests/x.json --out ../../y" in nb.cells[3].source
    )  # found from where the edition is


def test_a_teacher_gets_solutions_and_notes(root, tmp_path):
    (path,) = write_edition(root, "teacher", tmp_path / "teacher")
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert sources[1].startswith("**For the teacher.**") and "minutes" in sources[1]
    assert "### BEGIN SOLUTION" in sources[2] and "### END SOLUTION" in sources[2]
    assert exercise("02.labels").ask_next in sources[4]


def test_what_is_only_for_teachers_is_tagged(root, tmp_path):
    """nbgrader removes the cells with this tag from what it releases; its marks do the rest."""
    (path,) = write_edition(root, "teacher", tmp_path / "teacher")
    nb = nbformat.read(path, as_version=4)
    notes = [cell for cell in nb.cells if "teacher" in cell.metadata.get("tags", [])]
    assert [cell.source.startswith("**For the teacher.**") for cell in notes] == [True, True]
    released = "\n".join(cell.source for cell in nb.cells if cell not in notes)
    released = re.sub("(?s)### BEGIN SOLUTION.*?### END SOLUTION", "", released)
    item = exercise("02.labels")
    for secret in (*item.hints, item.ask_next, item.mistakes[0].sentence, "input_ids += ids"):
        assert secret not in released


def test_slides_begin_at_headings_and_split_long_prose(root, tmp_path):
    paragraph = "\n".join(["A line of prose."] * 6)
    fenced = "```\n# no heading\n\nsecond part\n```"
    prose = f"{paragraph}\n\n{paragraph}\n\n{paragraph}\n## Part\nMore.\n\n{fenced}\n### Detail\n\n{paragraph}"
    path = root / "notebooks" / "02_masking.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells.insert(1, new_markdown_cell(prose))
    nbformat.write(nb, path)

    (path,) = write_edition(root, "slides", tmp_path / "slides")

    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    kinds = [cell.metadata.slideshow.slide_type for cell in nb.cells]
    assert kinds == ["slide", "notes", "subslide", "subslide", "slide"] + ["subslide"] * 3 + ["notes", "subslide"]
    sources = [cell.source for cell in nb.cells]
    assert sources[2:6] == [
        f"{paragraph}\n\n{paragraph}",
        paragraph,
        f"## Part\n\nMore.\n\n{fenced}",
        f"### Detail\n\n{paragraph}",
    ]
    assert nb.cells[6].outputs[0].text == "the answer"  # slides show what the executed notebook shows
    assert exercise("02.labels").ask_next in sources[8]


@pytest.mark.parametrize("edition", EDITIONS)
def test_pages_stand_beside_the_notebooks(root, tmp_path, edition):
    (root / "notebooks" / "terms.md").write_text("[01](01_x.ipynb), ../launchers/lab.sh\n")
    out = tmp_path / "outputs" / "course" / edition
    write_edition(root, edition, out)
    assert (out / "terms.md").read_text() == "[01](01_x.ipynb), ../../../launchers/lab.sh\n"
    (out / "terms.md").write_text("my notes")
    write_edition(root, edition, out)
    assert (out / "terms.md").read_text() == "my notes"
    write_edition(root, edition, out, overwrite=True)
    assert (out / "terms.md").read_text() != "my notes"


def test_a_learners_work_is_kept(root, tmp_path, capsys):
    out = tmp_path / "student"
    (path,) = write_edition(root, "student", out)
    path.write_text("my work")
    write_edition(root, "student", out)
    assert path.read_text() == "my work" and "exist and are kept" in capsys.readouterr().out
    write_edition(root, "student", out, overwrite=True)
    assert path.read_text() != "my work"


def test_the_source_is_never_replaced(root):
    for out in (root / "notebooks", root / "x" / ".." / "notebooks"):
        with pytest.raises(UserError, match="holds the source"):
            write_edition(root, "student", out, overwrite=True)


def test_an_unknown_edition_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=" or ".join(EDITIONS)):
        write_edition(tmp_path, "pupil", tmp_path / "out")
