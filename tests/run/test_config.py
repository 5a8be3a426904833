import json

import pytest

from minisft.errors import UserError
from minisft.files import write_json
from minisft.run.config import RunConfig
from minisft.run.folder import Run, all_runs


def test_the_defaults_are_the_original_hyperparameters():
    config = RunConfig()
    assert (config.learning_rate, config.epochs, config.batch_size) == (8e-6, 8, 8)
    assert (config.weight_decay, config.max_grad_norm, config.max_length) == (1e-5, 2.0, 2048)


def test_the_course_can_be_shortened(monkeypatch):
    monkeypatch.setenv("MINISFT_COURSE_STEPS", "2")
    assert (RunConfig.course().max_steps, RunConfig.course().save_steps) == (2, 2)
    for nonsense in ("abc", "0", "-1", "1.5"):
        monkeypatch.setenv("MINISFT_COURSE_STEPS", nonsense)
        with pytest.raises(UserError, match="MINISFT_COURSE_STEPS"):
            RunConfig.course()


@pytest.mark.parametrize("strategy", ["vanilla", "ddp", "zero0", "zero1", "zero2", "zero3"])
def test_the_course_has_one_global_batch(strategy):
    config = RunConfig.course(strategy)
    assert config.global_batch == 8
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "zero9"}, "unknown strategy 'zero9': use one of vanilla"),
        ({"strategy": "zero2", "ranks": 0}, "ranks is 0: give at least 1"),
        ({"strategy": "zero2", "ranks": -1}, "ranks is -1"),
        ({"strategy": "vanilla", "ranks": 2}, "vanilla runs in one process"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"max_steps": 0}, "max steps is 0"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"weight_decay": -1}, "weight decay is -1"),
        ({"max_grad_norm": float("inf")}, "max grad norm is inf"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"max_length": 1}, "max length is 1"),
        ({"precision": "int4"}, "unknown precision"),
        ({"name": "../evil"}, "cannot be a folder"),
        ({"name": "a b;rm"}, "cannot be a folder"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes, says):
    with pytest.raises(UserError, match=says) as error:
        RunConfig(**changes)
    assert "\n" not in str(error.value)


def test_unknown_settings_in_a_run_folder_are_named():
    with pytest.raises(UserError, match="lerning_rate"):
        RunConfig.from_dict({"lerning_rate": 1})


def test_a_half_written_metrics_line_is_left_out(tmp_path):
    run = Run(tmp_path)
    assert run.metrics == []
    rest = {"loss": 2.5, "tokens": 9, "trained_tokens": 4, "seconds": 0.5, "warm_up": False}
    lines = [{"step": step} | rest for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ste')
    assert run.metrics == lines
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\nnonsense\n")
    with pytest.raises(UserError, match="a line that is not JSON"):
        _ = run.metrics


def test_status_follows_the_markers(tmp_path):
    run = Run(tmp_path)
    assert run.status == "prepared"
    (tmp_path / "logs").mkdir()
    assert run.status == "unfinished"
    failure = {"rank": 0, "step": 3, "reason": "out of memory"}
    write_json(tmp_path / "FAILED", failure)
    assert run.status == "failed"
    assert run.failure == failure


def test_checkpoints_come_in_step_order(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-x", "tmp-checkpoint-5"):
        (tmp_path / name).mkdir()
    assert [p.name for p in Run(tmp_path).checkpoints] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_a_missing_or_damaged_run_is_named(own_outputs):
    with pytest.raises(UserError, match=r"no run 'nope'.*none yet"):
        Run.load("nope")
    folder = own_outputs / "model" / "broken"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    assert [run.name for run in all_runs()] == ["broken"]
    with pytest.raises(UserError, match="damaged"):
        _ = Run.load("broken").config
