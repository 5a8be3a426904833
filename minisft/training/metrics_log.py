"""Writes a run's metrics: `metrics.jsonl`, TensorBoard events, a line for the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from minisft.files import open_own
from minisft.text import harmless, say
from minisft.training.checkpoints import cut_metrics
from minisft.training.progress import progress

WARM_UP_STEPS = 2  # not counted in speeds: the first steps fill caches and allocate optimizer states
COUNTS = ("tokens", "trained_tokens")
BAR = 24  # characters of the progress bar
STEP = re.compile(r"step +(\d{1,12})/(\d{1,12}) +(.*)")  # the line that `MetricsLogger` logs for each step
TENSORBOARD = ("loss", "lr", "grad_norm", "tokens", "trained_tokens", "seconds")


class MetricsLogger:
    """Writes the metrics on rank 0. `start` is the step that a resumed run continues, else 0."""

    def __init__(self, folder: Path, start: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / "metrics.jsonl"
        self.steps = steps
        self.recent: deque[float] = deque(maxlen=20)
        self.lines: list[dict[str, Any]] = []
        cut_metrics(self.file, start)
        # TensorBoard then ignores what an earlier process wrote after step `start`.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None, flush_secs=10)

    def write(self, line: dict[str, Any]) -> None:
        """Record one step; `line` has the keys of `metrics.jsonl`, and `warm_up` is added."""
        line = line | {"warm_up": len(self.lines) < WARM_UP_STEPS}
        with os.fdopen(open_own(self.file, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        for key in TENSORBOARD:
            if line[key] is not None:
                self.board.add_scalar(f"train/{key}", line[key], line["step"])
        self.lines.append({key: line[key] for key in ("tokens", "trained_tokens", "seconds", "warm_up")})
        self.recent.append(line["seconds"])
        pace = median(self.recent)
        progress.info(
            f"step {line['step']:>3}/{self.steps}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  "
            f"{line['tokens'] / max(line['seconds'], 1e-9):,.0f} tokens/s  "
            f"about {duration((self.steps - line['step']) * pace)} left"
        )

    def test_loss(self, step: int, loss: float) -> None:
        """Record the test loss of the checkpoint at `step`."""
        self.board.add_scalar("test/loss", loss, step)
        progress.info(f"checkpoint-{step}: test loss {loss:.4f}")

    def finish(self) -> dict[str, Any]:
        """Close TensorBoard's file; return this process's speed after the warm-up."""
        self.board.close()
        return speed(self.lines)


class TerminalProgress:
    """Prints a run's output; on a terminal the steps share one line with a progress bar."""

    def __init__(self, stream: TextIO | None):
        self.stream, self.open = stream, False
        self.redraws = stream is not None and stream.isatty()

    def __call__(self, line: str) -> None:
        step = STEP.match(line)
        if self.stream is None or not (step and self.redraws):
            self.close()
            say(line, to=self.stream)
            return
        done, steps = int(step[1]), int(step[2])
        filled = BAR * min(done, steps) // max(steps, 1)
        text = f"[{'#' * filled}{'.' * (BAR - filled)}] {harmless(line)}"
        columns = shutil.get_terminal_size().columns
        self.stream.write("\r\033[K")  # clear the line; written directly, since `say` would escape it
        say(text[: columns - 1], to=self.stream, end="")
        self.open = True

    def close(self) -> None:
        """End the line of the progress bar, which stays as it is."""
        if self.open:
            say(to=self.stream)
        self.open = False


def speed(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens and trained tokens per second after the warm-up; None without such steps.

    The first `WARM_UP_STEPS` steps of every process are warm-up, also after a resume. A step's time
    runs from fetching its rows to the end of the optimizer's step; saving, testing and measuring do
    not count.
    """
    counted = [m for m in metrics if not m["warm_up"]]
    seconds = sum(m["seconds"] for m in counted)
    rates = {f"{key}_per_second": sum(m[key] for m in counted) / seconds if seconds > 0 else None for key in COUNTS}
    return rates | {"warm_up_steps_left_out": len(metrics) - len(counted)}


def duration(seconds: float) -> str:
    """Format a duration as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
