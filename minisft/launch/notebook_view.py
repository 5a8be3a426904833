"""Shows a run in a notebook cell: its progress, loss, the state of every rank, and the log.

All of it is read from the run folder, so the view costs the training next to nothing. Everything
read from there is escaped. Where HTML cannot be shown, the view is a few lines of text.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from html import escape
from typing import Any

from typing_extensions import TypedDict

from minisft.errors import UserError
from minisft.files import Tail, last_lines, parse_json
from minisft.run.folder import Run
from minisft.training.heartbeat import read_heartbeats
from minisft.training.metrics_log import STEP

REFRESH = 1.0  # seconds between two updates of the display
LOG_LINES = 6
POINTS = 240  # at most, on the loss curve
WIDTH, HEIGHT = 440, 120  # of the loss curve, in pixels
COLOURS = {"done": "#009E73", "failed": "#D55E00"}


def in_notebook() -> bool:
    """Return whether this code runs in a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class Point(TypedDict):
    """The part of a line of `metrics.jsonl` that the loss curve needs."""

    step: int
    loss: float


class LiveView:
    """A display of a run: call it with each line of output, `tick` it often, `close` it last."""

    def __init__(self, run: Run):
        self.run = run
        self.metrics = Tail(run.folder / "metrics.jsonl")
        self.losses: list[tuple[int, float]] = []
        self.notes: list[str] = []  # lines of the run's output that are not steps
        self.step, self.steps, self.step_details = 0, 0, ""
        self.began = time.monotonic()
        self._drawn = 0.0
        self._handle: Any = None

    def __call__(self, line: str) -> None:
        if match := STEP.match(line):
            self.step, self.steps, self.step_details = int(match[1]), int(match[2]), match[3]
        else:
            self.notes.append(line)

    def tick(self) -> None:
        """Update the display, at most once a second."""
        if time.monotonic() - self._drawn > REFRESH:
            self._show()

    def close(self) -> None:
        self._show()

    def _show(self) -> None:
        from IPython.display import display

        self._read()
        bundle = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._drawn = time.monotonic()

    def _read(self) -> None:
        for line in self.metrics.new_lines():
            with suppress(UserError):
                point = parse_json(line, self.metrics.file, Point)
                while self.losses and self.losses[-1][0] >= point["step"]:  # a resume repeats steps
                    self.losses.pop()
                self.losses.append((point["step"], point["loss"]))

    @property
    def headline(self) -> str:
        status = self.run.status
        if status == "failed" and (failure := self.run.failure) is not None:
            return f"{self.run.name} failed: {failure['reason']}"
        if status == "done":
            return f"{self.run.name} is done, {time.monotonic() - self.began:.0f} s after its start"
        if not self.steps:
            return f"{self.run.name} is starting ({time.monotonic() - self.began:.0f} s so far)"
        return f"{self.run.name}: step {self.step} of {self.steps}  {self.step_details}"

    def ranks(self) -> list[dict[str, str]]:
        """Return one row per rank that has reported; with its host if there are several."""
        signs = read_heartbeats(self.run.folder)
        several = len({sign.host for sign in signs}) > 1
        return [
            {"rank": str(s.rank)} | ({"host": s.host} if several else {}) | {"does": s.phase, "step": str(s.step)}
            for s in signs
        ]

    def log_lines(self) -> list[str]:
        """Return the last lines of rank 0's log, or of the launcher's if rank 0 has none."""
        logs = self.run.folder / "logs"
        log = next((lines for name in ("rank0.log", "launcher.log") if (lines := last_lines(logs / name))), [])
        return [line[:200] for line in log[-LOG_LINES:]]

    def text(self) -> str:
        share = self.step / self.steps if self.steps else 0
        lines = [self.headline, f"[{'#' * round(24 * share):.<24}]"]
        lines += [f"rank {r['rank']}: {r['does']}, step {r['step']}" for r in self.ranks()]
        return "\n".join([*lines, *self.notes])

    def html(self) -> str:
        colour = COLOURS.get(self.run.status, "#0072B2")
        share = 100 * self.step / self.steps if self.steps else 0
        rows = self.ranks()
        table = ""
        if rows:
            head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in r.values()) + "</tr>" for r in rows)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        log = ""
        if self.run.status != "done":  # a finished run needs no log
            lines = escape("\n".join(self.log_lines()))
            log = f'<details><summary>log</summary><pre style="font-size:85%">{lines}</pre></details>'
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        return (
            f'<div style="max-width:46em"><div style="font-weight:600;color:{colour}">{escape(self.headline)}</div>'
            f'<div role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100" '
            'style="background:rgba(128,128,128,.25);height:8px;border-radius:4px;margin:6px 0">'
            f'<div style="background:{colour};width:{share:.1f}%;height:8px;border-radius:4px"></div></div>'
            f"{curve(self.losses)}{table}{notes}{log}</div>"
        )


def curve(points: list[tuple[int, float]]) -> str:
    """Draw the loss against the step as SVG; "" for fewer than two finite points."""
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    every = -(-len(points) // POINTS)  # rounded up
    points = [*points[:-1:every], points[-1]]
    steps, losses = zip(*points, strict=True)
    low, high = min(losses), max(losses)
    width, height, left, top = WIDTH - 60, HEIGHT - 34, 50, 8
    wide, tall = max(steps[-1] - steps[0], 1), max(high - low, 1e-12)
    line = " ".join(
        f"{left + width * (step - steps[0]) / wide:.1f},{top + height * (high - loss) / tall:.1f}"
        for step, loss in points
    )
    label = f"Loss from {losses[0]:.3f} at step {steps[0]} to {losses[-1]:.3f} at step {steps[-1]}."
    x, y, right = left - 6, top + height, left + width
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" '
        'style="font:11px sans-serif;color:inherit" fill="currentColor">'
        f'<polyline points="{line}" fill="none" stroke="#0072B2" stroke-width="2"/>'
        f'<line x1="{left}" y1="{y + 4}" x2="{right}" y2="{y + 4}" stroke="currentColor" stroke-opacity=".4"/>'
        f'<text x="{x}" y="{top + 4}" text-anchor="end">{high:.3f}</text>'
        f'<text x="{x}" y="{y}" text-anchor="end">{low:.3f}</text>'
        f'<text x="{left}" y="{y + 20}">step {steps[0]}</text>'
        f'<text x="{right}" y="{y + 20}" text-anchor="end">step {steps[-1]}</text>'
        f'<text x="{(left + right) / 2}" y="{y + 20}" text-anchor="middle">loss</text></svg>'
    )
