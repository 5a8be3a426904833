"""The figure of memory through one training step, measured on one rank of each run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import Picture, figure_of, in_figure, picture_of
from minisft.text import unit_for
from minisft.zero.activation_trace import ACTIVATIONS, BACKWARD, LOGITS
from minisft.zero.peak_memory import STEP_OWNER

STEP_COLOURS = OWNER_COLOURS | {ACTIVATIONS: "#117733", LOGITS: "#A9D5A5", BACKWARD: "#444444", STEP_OWNER: "#888888"}
PHASES = {"forward": "#FFFFFF", "backward": "#EEEEEE", "step": "#FFFFFF"}  # backgrounds


def step_timeline(memories: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Draw the bytes of live tensors through one step of a rank of each run, on the same axes, and
    who owns them at the peak.

    `memories` maps a run's name to one rank's entry of `Run.memory`, from a run with
    `memory_timeline` on.
    """
    steps = {name: _Step(memory["step"]) for name, memory in memories.items()}
    size, unit = unit_for(max(step.peak for step in steps.values()))
    layout = {"nrows": len(steps), "ncols": 2, "width_ratios": (4, 1), "squeeze": False}
    figure, panels = figure_of(9.4, 0.6 + 3.2 * len(steps), **layout)
    highest, longest = 1.12 * max(s.peak for s in steps.values()) / size, max(len(s.totals) for s in steps.values())
    for (axes, column), (name, step) in zip(panels, steps.items(), strict=True):
        _draw_line(axes, step, size)
        axes.set(xlim=(0, 1.01 * longest), ylim=(0, highest), ylabel=f"{unit} of tensors", title=in_figure(name))
        _draw_column(column, step, size)
        column.set(xlim=(-0.5, 3.4), ylim=(0, highest), xticks=[0], xticklabels=["at the peak"], yticks=[])
        column.spines[["left", "bottom"]].set_visible(False)
    panels[-1][0].set_xlabel("tensors made and freed, in order")
    peaks = [f"{in_figure(n)} peaks in {s.phase}, at {s.peak / s.before:.1f} times" for n, s in steps.items()]
    figure.suptitle(f"{'; '.join(peaks)} its memory between steps", fontsize=11)
    return picture_of(figure, " ".join(_told(name, step, size, unit) for name, step in steps.items()))


class _Step:
    """One recorded step: totals by phase and owners at the peak, with the bytes that were not seen."""

    def __init__(self, step: Mapping[str, Any]):
        begin = next(i for i, (_, held) in enumerate(step["timeline"]) if held == step["before"])
        self.totals = [(phase, held + step["unseen"]) for phase, held in step["timeline"][begin:]]
        self.before = step["before"] + step["unseen"]
        self.peak = step["peak"]["total"] + step["unseen"]
        self.phase = {"step": "the optimizer's step"}.get(step["peak"]["phase"], step["peak"]["phase"])
        self.owners = dict(sorted(step["peak"]["held"].items(), key=lambda item: -item[1]))
        if step["unseen"]:
            self.owners["buckets"] = self.owners.get("buckets", 0) + step["unseen"]


def _draw_line(axes: Any, step: _Step, size: float) -> None:
    """Draw the total after each change over a background that tells the phases apart."""
    values = [held / size for _, held in step.totals]
    axes.plot(range(len(values)), values, color="black", linewidth=1)
    axes.plot(max(range(len(values)), key=values.__getitem__), step.peak / size, "v", color="black")
    axes.axhline(step.before / size, color="#888888", linestyle=":", linewidth=1)
    begin = 0
    for phase, changes in groupby(step.totals, key=lambda total: total[0]):
        end = begin + sum(1 for _ in changes)
        axes.axvspan(begin, end, color=PHASES.get(phase, "#FFFFFF"), zorder=0)
        axes.text((begin + end) / 2, 0.03, phase, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
        begin = end


def _draw_column(axes: Any, step: _Step, size: float) -> None:
    bottom = 0.0
    for owner, held in step.owners.items():
        axes.bar(0, held / size, bottom=bottom, width=0.8, color=STEP_COLOURS.get(owner, "#BBBBBB"), edgecolor="white")
        if held > 0.03 * step.peak:
            text = f"{in_figure(owner)}  {held / size:.2f}"
            axes.text(0.5, bottom + held / size / 2, text, va="center", fontsize=8)
        bottom += held / size


def _told(name: str, step: _Step, size: float, unit: str) -> str:
    each = ", ".join(f"{held / size:.2f} {unit} {owner}" for owner, held in step.owners.items() if held > size / 200)
    return (
        f"Bytes of tensors through one step of {name}: {step.before / size:.2f} {unit} before it, at most "
        f"{step.peak / size:.2f} {unit}, in {step.phase}: {each}."
    )
