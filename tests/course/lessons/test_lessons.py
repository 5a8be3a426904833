"""Every lesson: planted wrong answers get the sentence they need, right ones pass however written."""

import importlib
from pathlib import Path

import nbformat
import pytest

from minisft.course.editions import student_edition, teacher_edition
from minisft.course.lessons import MODULES, lesson_of

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PLANTED = {number: HERE / f"planted_{module}.py" for number, module in MODULES.items()}
LESSONS = {number: lesson_of(number) for number, file in PLANTED.items() if file.exists()}
EXERCISES = [  # those that run elsewhere start several processes
    pytest.param(item, id=item.name, marks=pytest.mark.distributed if item.run else ())
    for lesson in LESSONS.values()
    for item in lesson.exercises
]


def planted(item):
    """The wrong and the right answers to an exercise."""
    name = PLANTED[item.name[:2]]
    spec = importlib.util.spec_from_file_location(name.stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wrong, right = module.WRONG[item.name], module.RIGHT[item.name]
    if item.run:  # one start of its processes for all answers: results are remembered
        answers = [answer for answer, _ in wrong] + [m.answer for m in item.mistakes]
        item.run([*answers, *right, item.answer], item.all_cases())
    return wrong, right


@pytest.mark.parametrize("item", EXERCISES)
def test_every_wrong_answer_gets_its_own_sentence(item):
    wrong, _ = planted(item)
    assert len(wrong) >= 4
    for answer, says in wrong:
        shown = item.check(answer)
        assert shown.ok is False and says in shown.text, (says, shown.text)


@pytest.mark.parametrize("item", EXERCISES)
def test_right_answers_pass_however_they_are_written(item):
    _, right = planted(item)
    assert len(right) >= 3
    for answer in (*right, item.answer):
        assert item.check(answer).ok, item.check(answer)


@pytest.mark.parametrize("item", EXERCISES)
def test_every_mistake_is_recognized_by_what_it_returns(item):
    planted(item)
    for mistake in item.mistakes:
        shown = item.check(mistake.answer)
        assert shown.ok is False and mistake.sentence in shown.text, shown.text


@pytest.mark.parametrize("item", EXERCISES)
def test_an_exercise_is_whole(item):
    cases = item.all_cases()
    assert sum(bool(case.name) for case in cases) >= 2 and any(not case.name for case in cases)
    assert len(item.mistakes) >= 4 or item.explain
    assert len(set(item.hints)) == 2 and item.minutes and item.ask_next
    assert "Not attempted" in item.check(None).text
    space = {}
    exec(item.stub(), space)
    assert "Not attempted" in item.check(space[item.answer.__name__]).text


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_predictions_accept_their_stand_ins_and_nothing_else(number):
    for prediction in LESSONS[number].predictions.values():
        assert prediction.accepts(prediction.stand_in) and prediction.lesson and prediction.wants()
        assert not prediction.accepts(object())


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_notebook_and_lesson_agree(number):
    """Each prediction is made, then revealed; each exercise has its stub, and then its check."""
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    nb, lesson = nbformat.read(path, as_version=4), LESSONS[number]
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for key in lesson.predictions:
        asked = [i for i, c in enumerate(code) if c.source.startswith(f'predict("{number}.{key}", ...)')]
        revealed = [i for i, c in enumerate(code) if f'reveal("{number}.{key}", ' in c.source]
        assert len(asked) == len(revealed) == 1 and asked < revealed, key
    for item in lesson.exercises:
        stub = [i for i, c in enumerate(code) if c.source == item.stub().rstrip()]
        call = f'exercise("{item.name}").check({item.answer.__name__})'
        check = [i for i, c in enumerate(code) if c.source == call]
        assert len(stub) == len(check) == 1 and stub < check, item.name
        assert "exercise" in code[stub[0]].metadata.tags and "check" in code[check[0]].metadata.tags
    assert any(f'review("{number}")' in cell.source for cell in code)
    assert not any("<summary>Solution" in cell.source for cell in nb.cells)


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_the_editions(number):
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    nb, lesson = nbformat.read(path, as_version=4), LESSONS[number]
    student, teacher = student_edition(nb), teacher_edition(nb)
    for edition in (student, teacher):
        nbformat.validate(edition)
        assert not any(cell.get("outputs") for cell in edition.cells)
        graded = [cell.metadata.nbgrader for cell in edition.cells if "nbgrader" in cell.metadata]
        assert sum(entry["grade"] for entry in graded) == len(lesson.exercises) == len(graded) / 2
    texts = ["\n".join(cell.source for cell in edition.cells) for edition in (student, teacher)]
    for item in lesson.exercises:
        assert item.marked_source().rstrip() not in texts[0] and item.marked_source().rstrip() in texts[1]
        assert not any(hint in texts[0] for hint in item.hints) and item.ask_next in texts[1]
