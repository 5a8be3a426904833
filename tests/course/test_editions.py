"""The student's and the teacher's edition, as `minisft notebooks --edition` writes them."""

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
    train = new_code_cell("%%bash\n../launchers/run_zero.sh 1")
    cells = [new_markdown_cell("# Title"), stub, check, train]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "02_masking.ipynb")
    return tmp_path


def test_a_student_gets_no_output_and_no_solution(root, tmp_path):
    (path,) = write_edition(root, "student", tmp_path / "outputs" / "course" / "student")
    text, nb = path.read_text(), nbformat.read(path, as_version=4)
    assert "the answer" not in text and "SOLUTION" not in text and "your turn" in text
    assert nb.cells[1].metadata.nbgrader.solution and nb.cells[2].metadata.nbgrader.points == 1
    assert "../../../launchers/run_zero.sh" in nb.cells[3].source  # found from where the edition is


def test_a_teacher_gets_solutions_and_notes(root, tmp_path):
    (path,) = write_edition(root, "teacher", tmp_path / "teacher")
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert sources[1].startswith("**For the teacher.**") and "minutes" in sources[1]
    assert "### BEGIN SOLUTION" in sources[2] and "### END SOLUTION" in sources[2]
    assert exercise("02.labels").ask_next in sources[4]


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
