"""Runs side by side: their tables hold what the folders hold, and the sentence about them follows the numbers."""

import json

import pytest
from conftest import minisft

from minisft.course.figures.runs import comparison
from minisft.files import write_json
from minisft.launch.compare_runs import (
    comparison_frames,
    comparison_table,
    data_difference,
    fastest_runs,
    speed_quartiles,
    step_speeds,
    summary_rows,
    verdict,
)
from minisft.run.config import RunConfig
from minisft.run.folder import Run


@pytest.fixture
def make_run(own_outputs):
    def make(name, pace, states, ranks=2, on_gpu=False):
        folder = own_outputs / "model" / name
        (folder / "logs").mkdir(parents=True)
        config = RunConfig.course("vanilla" if ranks == 1 else "zero2", name=name, ranks=ranks)
        about = {"config": config.to_dict(), "model_folder": "model", "precision": "fp32", "on_gpu": on_gpu}
        write_json(folder / "run.json", about)
        lines = [
            {"step": i, "loss": 3 - i / 10, "tokens": 100, "trained_tokens": 50, "seconds": 100 / pace}
            | {"warm_up": i < 3, "bytes": [7, 8][:ranks]}
            for i in range(1, 7)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        held = {"parameters": states, "other tensors": 5}
        memory = [
            {
                "rank": r,
                "at rest": held,
                "after backward": held,
                "peak": 3 * states,
                "communication": {"all-gather": 40},
            }
            for r in range(ranks)
        ]
        write_json(folder / "memory.json", memory)
        (folder / "checkpoint-6").mkdir()
        (folder / "checkpoint-6" / "weights").write_bytes(b"x" * 1000)
        write_json(folder / "checkpoint-6" / "manifest.json", {"test_loss": 2.5})
        (folder / "logs" / "rank0.log").write_text("a\nlast words\n")
        return Run(folder)

    return make


def test_tables_hold_what_the_folders_hold(make_run):
    found = comparison_frames([make_run("a", 10, 1000), make_run("b", 20, 500, ranks=1)])
    assert {name: len(frame) for name, frame in found.items()} == {
        "metrics": 12,
        "memory": 2 * 2 * 2 + 2 * 2,
        "communication": 3,
        "checkpoints": 2,
        "logs": 2,
    }
    assert all(frame.columns[0] == "run" for frame in found.values())
    metrics = found["metrics"]
    assert metrics[metrics.run == "a"].bytes.tolist() == [8] * 6
    assert found["memory"].query("run == 'b' and owner == 'parameters'")["bytes"].tolist() == [500, 500]
    assert found["checkpoints"][["step", "test_loss", "best"]].values.tolist() == [[6, 2.5, True]] * 2
    assert found["logs"]["last"].tolist() == ["last words"] * 2


def test_tables_of_no_runs_are_empty():
    assert all(frame.empty for frame in comparison_frames([]).values())


def test_the_sentence_follows_the_numbers(make_run):
    slow, fast, near = make_run("slow", 10, 900, 1), make_run("fast", 40, 300), make_run("near", 39, 300)
    said = verdict([slow, fast, near])
    assert "Fastest here: fast and near, with 40 tokens/s; the slowest made 25% of that." in said
    assert "Leanest: fast and near, with 33% of slow's states per rank." in said
    assert "2 ranks share its cores" in said
    assert "cores" not in verdict([make_run("g", 10, 900, on_gpu=True), make_run("h", 20, 300, on_gpu=True)])
    assert verdict([slow]) == verdict([]) == ""


def test_runs_whose_steps_overlap_in_speed_are_not_ranked(make_run):
    a, b, c = make_run("a", 20, 900), make_run("b", 15, 900), make_run("c", 5, 900)
    lines = [json.loads(line) for line in (b.folder / "metrics.jsonl").read_text().splitlines()]
    for line, seconds in zip(lines, (1, 1, 4, 4, 20, 20), strict=True):
        line["seconds"] = seconds
    (b.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert step_speeds(b) == [25, 25, 5, 5]
    assert speed_quartiles(b) == (5, 15, 25)
    assert fastest_runs([a, b, c]) == ["a", "b"]
    assert "Fastest here: a and b" in verdict([a, b, c])
    assert "No run is measurably faster" in verdict([a, b])
    assert "measured once" in verdict([a, b])


def test_runs_of_different_rows_are_told_apart(make_run):
    runs = [make_run(name, 10, 900) for name in ("a", "b", "c", "old")]
    for run, digest in zip(runs, ("1", "2", "1"), strict=False):
        (run.folder / "data").mkdir()
        write_json(run.folder / "data" / "made_of.json", {"rows": 9, "sha256": {"train.arrow": digest}})
    said = data_difference(runs)
    assert said.startswith("These runs were not made from the same training rows")
    assert said.endswith(": a and c; b.")
    assert said in " ".join(minisft("compare").stdout.split("\n"))
    assert data_difference([runs[0], *runs[2:]]) == ""
    assert "not made from the same" not in minisft("compare", "a", "c").stdout


def test_a_run_that_has_not_started_has_dashes(make_run, own_outputs):
    folder = own_outputs / "model" / "new"
    folder.mkdir(parents=True)
    about = {"config": RunConfig(name="new").to_dict(), "model_folder": "model", "precision": "fp32"}
    write_json(folder / "run.json", about)
    rows = summary_rows([make_run("a", 10, 1000), Run(folder)])
    assert comparison_table(rows).splitlines()[2].split() == ["new", "prepared", "1", "0", "-", "-", "-", "-", "-", "-"]
    assert verdict([Run(folder)]) == ""


def test_the_figure_names_the_fastest_and_the_leanest(make_run, monkeypatch):
    from minisft.course.figures import runs

    titles = []
    real = runs.picture_of
    monkeypatch.setattr(runs, "picture_of", lambda f, alt: titles.append(f.get_suptitle()) or real(f, alt))
    picture = comparison([make_run("a", 10, 1_000_000, 1), make_run("b", 20, 500_000)])
    assert titles == ["On this machine b was the fastest, and b held the least between steps"]
    assert "a 10 tokens/s" in picture.alt
