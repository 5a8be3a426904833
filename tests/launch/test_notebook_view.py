"""The live view of a run: what it says, and that nothing of a run's text becomes markup."""

import json
from html.parser import HTMLParser

import pytest

from minisft.files import write_json
from minisft.launch.notebook_view import LiveView, curve
from minisft.run.config import RunConfig
from minisft.run.folder import Run
from minisft.training.heartbeat import Heartbeat

HOSTILE = "<script>alert(1)</script> & \x1b[31m"


@pytest.fixture
def view(tmp_path):
    write_json(tmp_path / "run.json", {"config": RunConfig(name="mine").to_dict()})
    (tmp_path / "logs").mkdir()
    return LiveView(Run(tmp_path))


def tags(html):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(html)
    return found


def test_it_follows_a_run_from_its_start_to_its_end(view):
    assert "is starting" in view.text()
    pulse = Heartbeat(view.run.folder, 0)
    pulse.says("training")
    view("resuming from checkpoint-4")
    with (view.run.folder / "metrics.jsonl").open("a") as metrics:
        for step in range(1, 4):
            view(f"step   {step}/6  loss {3 - step / 10:.4f}  about 3 s left")
            metrics.write(json.dumps({"step": step, "loss": 3 - step / 10}) + "\n")
        metrics.write('{"step": 4, "lo')
    view._read()
    assert view.losses == [(1, 2.9), (2, 2.8), (3, 2.7)]
    assert view.text().splitlines() == [
        f"{view.run.name}: step 3 of 6  loss 2.7000  about 3 s left",
        "[############............]",
        "rank 0: training, step 0",
        "resuming from checkpoint-4",
    ]
    assert "Loss from 2.900 at step 1 to 2.700 at step 3." in view.html()
    write_json(view.run.folder / "DONE", {"steps": 1})
    pulse.stop("done")
    assert "is done" in view.html()


def test_nothing_from_the_run_becomes_markup(view):
    view(HOSTILE)
    view(f"step 1/2  {HOSTILE}")
    (view.run.folder / "logs" / "rank0.log").write_text(HOSTILE)
    Heartbeat(view.run.folder, 0).stop(HOSTILE)
    assert "script" not in tags(view.html())
    write_json(view.run.folder / "FAILED", {"rank": 0, "step": 1, "reason": HOSTILE})
    html = view.html()
    assert "script" not in tags(html)
    assert "&lt;script&gt;" in html


def test_a_metrics_file_that_is_cut_by_a_resume_is_read_anew(view):
    file = view.run.folder / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": float(step)}) + "\n" for step in range(1, 7)]
    file.write_text("".join(lines))
    view._read()
    file.write_text("".join(lines[:3]))
    view._read()
    with file.open("a") as stream:
        stream.write(json.dumps({"step": 4, "loss": 40.0}) + "\n")
    view._read()
    assert view.losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, float("nan")), (2, 2.0)], [(1, float("inf"))]])
def test_no_curve_without_two_numbers(points):
    assert curve(points) == ""


def test_the_curve_of_a_long_run_stays_small():
    assert len(curve([(step, 1.0) for step in range(100_000)])) < 8000
