"""The figure of memory through one training step, measured on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import PALETTE, Picture, figure_of, in_figure, picture_of
from minisft.text import unit_for
from minisft.zero.activation_trace import ACTIVATIONS, BACKWARD, LOGITS
from minisft.zero.peak_memory import STEP_OWNER

STEP_COLOURS = OWNER_COLOURS | {ACTIVATIONS: "#7A5195", LOGITS: "#B7A1D6", BACKWARD: "#444444", STEP_OWNER: "#888888"}


def step_timeline(memory: Mapping[str, Any], name: str) -> Picture:
    """Draw the bytes of live tensors through one step of a rank, and who owns them at the peak.

    `memory` is one rank's entry of `Run.memory`, from a run with `memory_timeline` on.
    """
    step = memory["step"]
    begin = next(i for i, (_, held) in enumerate(step["timeline"]) if held == step["before"])
    totals = [(phase, held + step["unseen"]) for phase, held in step["timeline"][begin:]]
    size, unit = unit_for(max(held for _, held in totals))
    figure, (axes, column) = figure_of(9.4, 3.6, ncols=2, width_ratios=(4, 1))
    colors = {"forward": PALETTE[0], "backward": PALETTE[1], "step": PALETTE[2]}
    begin = 0  # first index of the current phase
    before = step["before"] + step["unseen"]
    for i in range(1, len(totals) + 1):
        if i == len(totals) or totals[i][0] != totals[begin][0]:
            phase = totals[begin][0]
            known = {line.get_label() for line in axes.lines}
            label = phase if phase not in known else None
            values = [held / size for _, held in totals[max(0, begin - 1) : i]]
            x = range(max(0, begin - 1), i)
            axes.plot(x, values, color=colors.get(phase, PALETTE[6]), linewidth=1.2, label=label)
            begin = i
    peak, phase = step["peak"]["total"] + step["unseen"], step["peak"]["phase"]
    where = max(range(len(totals)), key=lambda i: totals[i][1])
    axes.plot(where, peak / size, "v", color="black")
    axes.axhline(before / size, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="tensors made and freed, in order", ylabel=f"{unit} of tensors", ylim=(0, 1.1 * peak / size))
    axes.legend(frameon=False)
    owners = dict(sorted(step["peak"]["held"].items(), key=lambda item: -item[1]))
    if step["unseen"]:
        owners["buckets"] = owners.get("buckets", 0) + step["unseen"]
    bottom = 0.0
    for owner, held in owners.items():
        color = STEP_COLOURS.get(owner, "#BBBBBB")
        column.bar(0, held / size, bottom=bottom, width=0.8, color=color, edgecolor="white")
        if held > 0.03 * peak:
            text = f"{in_figure(owner)}  {held / size:.2f}"
            column.text(0.5, bottom + held / size / 2, text, va="center", fontsize=8)
        bottom += held / size
    column.set(xlim=(-0.5, 3.2), ylim=axes.get_ylim(), xticks=[0], xticklabels=["at the peak"], yticks=[])
    column.spines[["left", "bottom"]].set_visible(False)
    most = next(iter(owners))
    figure.suptitle(
        f"{in_figure(name)} peaks in {_phase(phase)}, at {peak / before:.1f} times its memory between steps: "
        f"{owners[most] / peak:.0%} of it are {in_figure(most)}",
        fontsize=11,
    )
    each = ", ".join(f"{held / size:.2f} {unit} {owner}" for owner, held in owners.items())
    return picture_of(
        figure,
        f"Bytes of tensors through one step of {name}: {before / size:.2f} {unit} before it, at most "
        f"{peak / size:.2f} {unit}, in {_phase(phase)}: {each}.",
    )


def _phase(phase: str) -> str:
    return {"step": "the optimizer's step"}.get(phase, phase)
