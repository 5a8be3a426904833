import json
import logging

import pytest

from minisft.errors import UserError
from minisft.training.checkpoints import cut_metrics
from minisft.training.metrics_log import MetricsLogger, TerminalProgress, duration, speed


def line(step, seconds=0.5):
    return {
        "step": step,
        "epoch": 0.1,
        "loss": 2.0 / step,
        "lr": 1e-4,
        "grad_norm": None,
        "tokens": 100,
        "trained_tokens": 40,
        "seconds": seconds,
        "bytes": [1],
    }


def events(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {event.step: event.value for event in board.Scalars(tag)}


def test_a_resumed_run_has_every_step_once_in_both_records(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = MetricsLogger(tmp_path, start=0, steps=6)
    for step in range(1, 6):
        first.write(line(step))
    first.board.flush()
    again = MetricsLogger(tmp_path, start=3, steps=6)
    for step in range(4, 7):
        again.write(line(step) | {"loss": 9.0})
    again.finish()
    found = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
    assert [m["loss"] for m in found[3:]] == [9.0] * 3
    assert events(tmp_path, "train/loss") == pytest.approx({1: 2, 2: 1, 3: 2 / 3, 4: 9, 5: 9, 6: 9})
    assert "step   6/6" in caplog.text


def test_speeds_leave_the_warm_up_out_and_say_so(tmp_path):
    observer = MetricsLogger(tmp_path, start=0, steps=4)
    for step, seconds in enumerate((60, 60, 0.5, 0.5), 1):
        observer.write(line(step, seconds))
    assert observer.finish() == {
        "tokens_per_second": 200,
        "trained_tokens_per_second": 80,
        "warm_up_steps_left_out": 2,
    }
    assert speed([])["tokens_per_second"] is None


def test_a_half_written_line_is_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_metrics(tmp_path / "none", 2)
    file.write_text('garbage\n{"step": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not JSON of a step"):
        cut_metrics(file, 2)
    assert file.read_text().startswith("garbage")


def test_a_terminal_shows_one_bar_and_a_pipe_every_line():
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = ["the command", "step   1/4  loss 2.0", "step   2/4  loss 1.0", "checkpoint-2: test loss 1.5"]
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        progress = TerminalProgress(stream)
        for line in said:
            progress(line)
        progress.close()
    assert pipe.getvalue().splitlines() == said
    assert terminal.getvalue().count("\n") == 3
    assert "[############............] step   2/4  loss 1.0\n" in terminal.getvalue()


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0.4, 99, 200, 7500)] == ["0 s", "99 s", "3 min 20 s", "2 h 05 min"]
