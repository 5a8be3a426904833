"""The figures on ZeRO: what their titles and alt texts say follows from the numbers that they are given."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import at_length

from minisft.course.figures import blocks, step_memory, zero
from minisft.course.figures import plan as plan_figure
from minisft.files import write_json
from minisft.launch.launch_run import prepare
from minisft.run.config import RunConfig
from minisft.zero.communication import OPERATIONS, bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import Shapes
from minisft.zero.planner import plan

SHAPES = Shapes(((("a", 3000), ("b", 1001)), (("norm", 40),)))


@pytest.fixture
def made(monkeypatch):
    """The figures' titles, in order."""
    titles = []
    real = zero.picture_of

    def picture(figure, alt):
        titles.append((figure._suptitle or figure.axes[0].title).get_text())
        return real(figure, alt)

    for module in (blocks, plan_figure, step_memory, zero):
        monkeypatch.setattr(module, "picture_of", picture)
    return titles


def test_communication_shows_what_was_predicted_and_measured(tiny_model, small_data, made):
    runs = []
    for strategy in ("vanilla", "zero1", "zero2"):
        run = prepare(RunConfig.course(strategy, model=str(tiny_model), data=str(small_data)), say=lambda line: None)
        moved = dict.fromkeys(OPERATIONS, 0) | {"reduce": 2_000_000}
        write_json(run.folder / "memory.json", [{"rank": 0, "communication": moved}])
        runs.append(run)
    picture = zero.communication(SHAPES, "fp32", runs, accumulation=4)
    assert picture.alt.count("measured") == 2 and "vanilla nothing predicted" in picture.alt
    again, once = (bytes_sent(predict_traffic(SHAPES, s, 2, "fp32", 4), 2) for s in ("zero2", "zero1"))
    assert made == [f"With 4 micro-batches per step ZeRO-2 sends {again / once:.1f} times what ZeRO-1 sends"]


def test_a_plan_names_the_chosen_one_what_does_not_fit_and_what_is_sent(made):
    picture = plan_figure.plan_bars(plan(7e9, 8, 80e9), 80e9)
    plan_figure.plan_bars(plan(7e9, 8, 24e9), 24e9)
    plan_figure.plan_bars(plan(1e12, 8, 80e9), 80e9)
    plan_figure.plan_bars(plan(1e9, 1, 80e9), 80e9)
    assert made[:2] == [
        "zero1 sends the least of those that fit",
        "zero3 sends the least of those that fit without offloading",
    ]
    assert made[2:] == ["Nothing fits", "vanilla sends the least of those that fit"]
    assert "ddp 112.0 GB, too much, sends 49.0 GB; zero1 38.5 GB, sends 24.5 GB;" in picture.alt


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_plan_sends_what_is_predicted_for_the_shapes(strategy):
    shapes = Shapes(((("a", 3_200_000),),))
    option = next(o for o in plan(shapes, 8, 80e9, accumulation=4).options if o.strategy == strategy)
    assert option.sent == bytes_sent(predict_traffic(shapes, strategy, 8, "bf16", 4), 8)


def test_each_rank_holds_what_the_formula_says(made):
    picture = blocks.stages_by_rank(7e9, 4)
    assert made == ["Each stage splits more of the same states: 112 GB on every rank become 28"]
    assert "stage 1 49.0 GB, fp32 masters, optimizer states split; stage 2 38.5 GB, gradients," in picture.alt
    assert zero.paper_bars(7e9, 4).alt.endswith("stage 1 49.0 GB; stage 2 38.5 GB; stage 3 28.0 GB.")


def test_the_collectives_are_drawn_from_what_they_compute():
    arrays = np.arange(16).reshape(4, 4)
    assert blocks.reduce_scatter(arrays).tolist() == [24, 28, 32, 36]
    assert blocks.all_gather(np.array([1, 2])).tolist() == [[1, 2], [1, 2]]
    assert blocks.all_reduce(arrays).tolist() == [[24, 28, 32, 36]] * 4
    assert "all sums, 46, 86, 126, 166." in blocks.collectives().alt


def test_steps_are_drawn_on_the_same_axes(monkeypatch, made):
    limits = []
    real = step_memory.picture_of

    def picture(figure, alt):
        limits.extend((axes.get_xlim(), axes.get_ylim()) for axes in figure.axes[::2])
        return real(figure, alt)

    def memory(*totals):
        phases = ("forward", "backward", "step")
        timeline = [[phase, total] for phase, total in zip(phases, totals, strict=False)]
        peak = {"phase": "backward", "total": max(totals), "held": {"parameters": max(totals)}}
        return {"step": {"timeline": timeline, "before": totals[0], "unseen": 0, "peak": peak}}

    monkeypatch.setattr(step_memory, "picture_of", picture)
    alt = step_memory.step_timeline({"a": memory(100, 400, 100), "b": memory(100, 200)}).alt
    assert limits[0] == limits[1]
    assert made == ["a peaks in backward, at 4.0 times; b peaks in backward, at 2.0 times its memory between steps"]
    assert "of b:" in alt


def test_the_map_counts_straddlers_and_padding(made):
    picture = zero.partition_map(SHAPES, 2)
    assert made == ["Stages 1 and 2 ignore tensors: 2 of 3 cross a border between ranks"]
    assert picture.alt.endswith("2 tensors cross a border, 3 elements are padding.")


@at_length  # notebook 03 runs the same, and shows it
@pytest.mark.distributed
def test_switches_of_a_live_engine():
    """Buckets and persistent parameters cost at rest, live parameters within the step."""
    none = '"stage3_param_persistence_threshold": 0'
    drop, keep = (
        f'{{{none}, "stage3_max_live_parameters": {n}, "stage3_max_reuse_distance": {n}}}' for n in (0, 10**9)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    command += [
        "minisft.course.experiments.shards",
        "--stage",
        "3",
        "--set",
        "{}",
        '{"reduce_bucket_size": 5000}',
        drop,
        keep,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("     ")]
    plain, bucket, dropped, kept = ([int(x.replace(",", "")) for x in row.split()] for row in rows)
    parameters = plain[1] // 4
    assert bucket[2] - plain[2] == 4 * 5000 - plain[0]
    assert dropped[1] == 0 and dropped[2] == plain[2] - plain[1]
    assert kept[:3] == dropped[:3]
    assert kept[3] - dropped[3] > 0.9 * 4 * parameters
