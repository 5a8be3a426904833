"""The figures on ZeRO: what their titles and alt texts say follows from the numbers that they are given."""

import subprocess
import sys

import pytest
from conftest import at_length

from minisft.course.figures import zero
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

    monkeypatch.setattr(zero, "picture_of", picture)
    return titles


def test_communication_shows_what_was_predicted_and_measured(tiny_model, small_data, made):
    runs = []
    for strategy in ("vanilla", "zero1", "zero2"):
        run = prepare(RunConfig.course(strategy, model=str(tiny_model), data=str(small_data)), say=lambda line: None)
        moved = dict.fromkeys(OPERATIONS, 0) | {"reduce": 2_000_000}
        write_json(run.folder / "memory.json", [{"rank": 0, "communication": moved}])
        runs.append(run)
    picture = zero.communication(SHAPES, "fp32", runs, accumulation=4)
    assert picture.alt.count("measured") == 2, "one process sends nothing"
    again, once = (bytes_sent(predict_traffic(SHAPES, s, 2, "fp32", 4), 2) for s in ("zero2", "zero1"))
    assert made == [f"With 4 micro-batches per step ZeRO-2 sends {again / once:.1f} times what ZeRO-1 sends"]


def test_a_plan_names_the_chosen_one_and_what_does_not_fit(made):
    picture = zero.plan_bars(plan(7e9, 8, 80e9), 80e9)
    zero.plan_bars(plan(1e12, 8, 80e9), 80e9)
    assert made == ["zero1 is the cheapest that fits", "Nothing fits"]
    assert "ddp 112.0 GB, too much; zero1 38.5 GB;" in picture.alt


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
