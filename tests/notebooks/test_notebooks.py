"""The committed notebooks: their form, and that each runs from top to bottom."""

import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import nbformat
import pytest

from minisft.course.editions import write_edition
from minisft.files import read_json

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_cells_are_short_and_prose_outweighs_code(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    code = [c.source.splitlines() for c in nb.cells if c.cell_type == "code"]
    prose = [c.source for c in nb.cells if c.cell_type == "markdown"]
    assert statistics.median(map(len, code)) <= 8
    assert max(map(len, code)) <= 25
    assert max(len(line) for cell in code for line in cell) <= 88
    assert sum(map(len, prose)) >= sum(len(line) for cell in code for line in cell)


@each_notebook
def test_committed_outputs_are_whole_clean_and_small(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "refresh it: launchers/run_notebooks.sh --in-place"
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert output.metadata["image/png"]["alt"]
    assert path.stat().st_size < 500_000
    text = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs])
    assert not re.search(r"/(home|root|Users|work|tmp)/", text)


@each_notebook
def test_nothing_is_attempted_in_what_is_committed(path):
    """The outputs that a student's edition gives: every check ran, and nothing was written for it."""
    nb = nbformat.read(path, as_version=4)
    checks = [c for c in nb.cells if c.cell_type == "code" and "check" in c.metadata.get("tags", [])]
    assert checks
    for cell in checks:
        assert "Not attempted yet" in cell.outputs[0].data["text/plain"]


@each_notebook
def test_links_between_notebooks_lead_somewhere(path):
    nb = nbformat.read(path, as_version=4)
    prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(([\w./-]+\.(?:ipynb|md))(?:#[^)]*)?\)", prose)
    assert all((path.parent / link).exists() for link in links), links
    number = NOTEBOOKS.index(path)
    neighbors = [NOTEBOOKS[i].name for i in (number - 1, number + 1) if 0 <= i < len(NOTEBOOKS)]
    assert set(neighbors) <= set(links), (neighbors, links)


TERM = re.compile(r"- \*\*(?P<term>.+?)\*\*: .+\. \(\[(?P<number>\d\d)\]\((?P<file>(?P=number)_\w+\.ipynb)\)\)")


def test_the_glossary_is_alphabetical_and_every_entry_has_one_form():
    _, *entries = (ROOT / "notebooks" / "terms.md").read_text().split("\n\n", 1)[1].split("\n- ")
    terms = [TERM.fullmatch(f"- {entry.strip()}")["term"] for entry in entries]
    keys = [term.lower().replace("-", " ") for term in terms]
    assert keys == sorted(set(keys))


def test_every_term_is_defined_where_the_glossary_says():
    """Each term stands in bold, in the singular or plural, in the prose of the notebook that its entry links to."""
    missing = []
    for entry in TERM.finditer((ROOT / "notebooks" / "terms.md").read_text()):
        path = ROOT / "notebooks" / entry["file"]
        cells = nbformat.read(path, as_version=4).cells if path.exists() else []
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        words = r"\s+".join(map(re.escape, entry["term"].split()))
        if not re.search(rf"\*\*{words}s?[.:,]?\*\*", prose, re.IGNORECASE):
            missing.append(f"{entry['number']}: {entry['term']}")
    assert not missing


@pytest.mark.notebook
@pytest.mark.distributed
@pytest.mark.model
def test_the_course_runs_from_top_to_bottom(tmp_path):
    """The teacher's edition, through the launcher, with two training steps in place of the preset's.

    It has the solutions, and a check of one that is wrong raises. What the student's edition says
    where nothing is written is in the committed outputs, which another test reads.
    """
    outputs, teacher = tmp_path / "outputs", write_edition(ROOT, "teacher", tmp_path / "teacher")
    env = os.environ | {"MINISFT_OUTPUTS": str(outputs), "MINISFT_COURSE_STEPS": "2", "MINISFT_SKIP_SETUP": "1"}
    env["NBGRADER_EXECUTION"] = "autograde"
    command = ["bash", str(ROOT / "launchers" / "run_notebooks.sh"), *map(str, teacher)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("vanilla", "zero1", "zero2", "zero3"):
        assert (outputs / "model" / name / "DONE").exists()
        summary = read_json(outputs / "evaluation" / name / "summary.json")
        assert [c["step"] for c in summary["checkpoints"]] == [0, 2]
    assert (outputs / "notebooks" / "index.html").exists()
    assert "without alt text" not in done.stdout
