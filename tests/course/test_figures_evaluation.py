import random
from types import SimpleNamespace

import pytest
from conftest import WORDS
from samples import size

from minisft.course.figures import evaluation
from minisft.course.figures.evaluation import draw, interval_widths, scores_over_steps
from minisft.errors import UserError


def summary(run, *bleus, loss=(2.0, 1.0)):
    checkpoints = [
        {"step": 3 * i, "bleu": b, "bleu_interval": [b - 2, b + 2], "chrf": 20.0, "chrf_interval": [18, 22]}
        for i, b in enumerate(bleus)
    ]
    for checkpoint, value in zip((checkpoints[0], checkpoints[-1]), loss, strict=True):
        checkpoint["loss"] = value
    return {"run": run, "rows": 12, "checkpoints": checkpoints}


def test_the_message_depends_on_whether_the_intervals_overlap():
    two = [summary("vanilla", 1, 4), summary("zero2", 1, 3)]
    picture = scores_over_steps(two)
    assert size(picture)[0] > 900
    assert "vanilla BLEU from 1.00 to 4.00" in picture.alt
    assert "loss from 2.00 to 1.00" in picture.alt


def test_titles():
    titles = [evaluation._message([summary("a", *bleus)]) for bleus in ((1, 4), (1, 9), (9, 1))]
    assert "With 12 answers BLEU's intervals before and after overlap" in titles[0]
    assert "rises beyond its intervals" in titles[1]
    assert "falls beyond its intervals" in titles[2]
    assert "the loss does not fall" in evaluation._message([summary("a", 1, 4, loss=(1.0, 2.0))])


def test_runs_that_coincide_are_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda *args, **style: drawn.append(style["label"]))
    picture = scores_over_steps([summary("vanilla", 1, 4), summary("zero2", 1, 3), summary("zero3", 1, 4)])
    assert drawn == ["vanilla, zero3"] * 2 + ["zero2"] * 2
    assert "vanilla, zero3 (equal scores) BLEU from 1.00 to 4.00" in picture.alt


def test_more_answers_narrow_the_interval(monkeypatch):
    chance = random.Random(1)
    said = [" ".join(chance.choices(WORDS, k=12)) for _ in range(40)]
    before, after = (
        [{"output": " ".join([*s.split()[: kept - i % 4], "cat"]), "reference": s} for i, s in enumerate(said)]
        for kept in (6, 9)
    )
    half_widths = {}
    real = evaluation.paired_bootstrap

    def compared(outputs, *rest, **options):
        found = real(outputs, *rest, **options)
        half_widths.setdefault(len(outputs), []).append(found.half_width)
        return found

    monkeypatch.setattr(evaluation, "paired_bootstrap", compared)
    alt = interval_widths(before, after, draws=6).alt
    assert "40 answers: \N{PLUS-MINUS SIGN}" in alt
    mean = {size: sum(found) / len(found) for size, found in half_widths.items()}
    assert list(mean) == [4, 8, 16, 32, 40]
    assert mean[40] < mean[16] < 1.3 * mean[4]


def test_without_a_single_match_there_is_no_width():
    answers = [{"output": "dog", "reference": "the cat sat on the mat"}] * 5
    assert "differ by 0 points on every sample" in interval_widths(answers, answers, draws=2).alt


@pytest.mark.attack("15")
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"run": "r", "rows": 1, "checkpoints": []}', '{"run": 1, "rows": 1, "checkpoints": [{}]}']
)
def test_results_of_another_shape_are_one_sentence(own_outputs, text):
    folder = own_outputs / "evaluation" / "r"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary.json .* is damaged"):
        draw([SimpleNamespace(name="r")])


def test_without_results_there_is_no_figure(own_outputs):
    assert draw([SimpleNamespace(name="r")]) is None
