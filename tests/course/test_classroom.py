import pytest

from minisft.course import classroom
from minisft.course.classroom import PredictFirst, predict, reveal, review
from minisft.course.lessons import Lesson
from minisft.course.predictions import Choice, Interval, Number, Order, Several
from minisft.errors import UserError

LESSON = Lesson(
    objectives=(),
    minutes=1,
    predictions={
        "half": Number("bytes per parameter", 12, "The master copy is missing.", unit="bytes"),
        "time": Interval("seconds", (1, 2), "A wide range says little.", unit="s"),
        "stage": Choice("the stage", "zero1", "Stage 1 splits most.", options=("zero1", "zero3")),
        "kept": Several("the rows that survive", ["a"], "Empty rows are dropped.", options=("a", "b", "c")),
        "order": Order("from fast to slow", ["a", "b"], "It depends.", options=("a", "b")),
    },
)


@pytest.fixture(autouse=True)
def lesson(monkeypatch):
    monkeypatch.setattr(classroom, "lesson_of", lambda number: LESSON)
    monkeypatch.setattr(classroom, "_entries", {})
    monkeypatch.delenv("MINISFT_STAND_INS", raising=False)


def test_nothing_is_revealed_before_a_prediction(capsys):
    assert "replace the dots by one number (bytes)" in repr(predict("03.half", ...))
    with pytest.raises(PredictFirst, match="Predict first") as caught:
        reveal("03.half", 16)
    assert 'the cell `predict("03.half", ...)` above' in str(caught.value)
    assert "16" not in str(caught.value) and capsys.readouterr().out == ""
    assert caught.value._render_traceback_() == [str(caught.value)]  # no traceback in Jupyter


def test_a_prediction_may_be_changed_until_the_reveal(capsys):
    predict("03.half", 12)
    predict("03.half", 14)  # still open
    reveal("03.half", 16)
    assert "Predicted: 14 bytes. True: 16 bytes (too small by 2 bytes)." in capsys.readouterr().out
    assert "prediction before the reveal counts, and it was 14 bytes" in repr(predict("03.half", 16))
    reveal("03.half", 16)  # running the cell again shows the same
    assert "14 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "answer", "truth", "says"),
    [
        ("half", 16, 16, "That is right."),
        ("half", 160, 16, "too large by a factor of 10"),
        ("time", (2, 5), 3.5, "That is right."),
        ("time", (2, 5), 9.0, "too small by 4 s"),
        ("stage", "zero3", "zero1", "True: zero1 (another one)."),
        ("kept", {"a", "b"}, ["b", "c"], "not predicted: c; predicted in vain: a"),
        ("kept", ("b", "c"), ["c", "b"], "That is right."),
        ("order", ["b", "a"], ["a", "b"], "different from place 1 on"),
    ],
)
def test_a_reveal_says_how_far_off_it_was(name, answer, truth, says, capsys):
    assert "recorded" in repr(predict(f"03.{name}", answer))
    reveal(f"03.{name}", truth)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        *(("half", a) for a in ("16", [16], float("nan"), True)),
        *(("time", a) for a in (1, (1,), ("a", "b"))),
        *(("stage", a) for a in ("zero2", 1, ["zero1"])),
        *(("kept", a) for a in ("a", ["d"])),
        *(("order", a) for a in (["a"], ["a", "a"], {"a", "b"})),
    ],
)
def test_an_answer_of_the_wrong_kind_is_not_recorded(name, answer):
    assert repr(predict(f"03.{name}", answer)).startswith("Not recorded: give ")
    with pytest.raises(PredictFirst):
        reveal(f"03.{name}", 1)


def test_a_range_whose_ends_are_swapped_is_refused():
    assert repr(predict("03.time", (80, 50))) == "Not recorded: the low end comes first: give (50, 80)."
    with pytest.raises(PredictFirst):
        reveal("03.time", 60)


def test_stand_ins_are_used_where_nobody_predicts(monkeypatch, capsys):
    monkeypatch.setenv("MINISFT_STAND_INS", "1")
    assert "usual guess is recorded: 12 bytes" in repr(predict("03.half", ...))
    reveal("03.half", 16)
    assert "Usual guess: 12 bytes. True: 16 bytes" in capsys.readouterr().out


def test_a_review_says_which_were_off_and_what_that_says():
    predict("03.half", 12)
    reveal("03.half", 16)
    predict("03.stage", "zero1")
    reveal("03.stage", "zero1")
    text = repr(review("03"))
    assert text.startswith("1 of 5 predictions were right.")
    assert "too small by 4 bytes. The master copy is missing." in text
    assert "not predicted, or not revealed yet" in text
    assert review("03")._repr_html_().count("<tr>") == 6


def test_an_unknown_prediction_is_named():
    with pytest.raises(UserError, match="there is no prediction"):
        predict("03.whole", 1)
