"""Figures of ZeRO's memory and communication, predicted by `minisft.zero` or measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from minisft.course.figures.blocks import STATES
from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import Picture, figure_of, in_figure, mark_measured, picture_of, stacked_bars
from minisft.run.folder import Run
from minisft.text import unit_for
from minisft.zero.communication import OPERATIONS, bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import Shapes, partition_size
from minisft.zero.state_memory import MOMENTS, OWNERS, paper_formula, predict_states, total_bytes

STAGES = ("stage 0", "stage 1", "stage 2", "stage 3")
# Colors are for owners of bytes. Operations have hatches on slate, and strategies have lines and markers.
OPERATION_COLOURS = dict(zip(OPERATIONS, ("#D9E0E6", "#A8B6C2", "#A8B6C2", "#5B7083"), strict=True))
OPERATION_HATCHES = dict(zip(OPERATIONS, ("...", "///", "", ""), strict=True))
STRATEGY_LINES: dict[str, dict[str, Any]] = {
    "ddp": {"linestyle": ":", "marker": "s", "markersize": 8, "markerfacecolor": "white"},
    "zero1": {"linestyle": "-", "marker": "o", "markersize": 8, "markerfacecolor": "white"},
    "zero2": {"linestyle": "--", "marker": "o", "markersize": 4},
    "zero3": {"linestyle": "-.", "marker": "^", "markersize": 5},
}
RANK_COLOURS = ("#5B7083", "#D9E0E6")  # of ranks in turn


def predicted_bars(
    shapes: Shapes,
    strategies: Mapping[str, int],
    precision: str,
    moment: str = "after backward",
    runs: Sequence[Run] = (),
) -> Picture:
    """Draw the predicted bytes of the fullest rank, one bar per strategy, by owner.

    `strategies` maps a strategy to its number of ranks. A tick marks what a run in `runs` with the
    same strategy and number of ranks measured.
    """
    assert moment in MOMENTS
    bars = {}
    for strategy, ranks in strategies.items():
        deepspeed = next((r.deepspeed for r in runs if _same(r, strategy, ranks)), None)
        bars[strategy] = max(
            (rank[moment] for rank in predict_states(shapes, strategy, ranks, precision, deepspeed)), key=total_bytes
        )
    size, unit = unit_for(max(map(total_bytes, bars.values())))
    figure, axes = figure_of(7.6, 0.9 + 0.55 * len(bars))
    names = [f"{name} ({ranks} rank{'s' if ranks > 1 else ''})" for name, ranks in strategies.items()]
    parts = {owner: [bar[owner] / size for bar in bars.values()] for owner in OWNERS}
    ends = stacked_bars(axes, names, parts, OWNER_COLOURS)
    measured = _measured(strategies, runs, moment)
    mark_measured(axes, [(i, measured[s] / size) for i, s in enumerate(strategies) if s in measured])
    verdict = ""
    if measured:
        worst = max(abs(held - total_bytes(bars[strategy])) for strategy, held in measured.items())
        verdict = ", measured to the byte" if not worst else f", measured within {worst:,} bytes"
    first, least = next(iter(bars)), min(map(total_bytes, bars.values()))
    lightest = [name for name, bar in bars.items() if total_bytes(bar) == least]
    does = "hold" if len(lightest) > 1 else "holds"
    title = f"{' and '.join(lightest)} {does} {least / total_bytes(bars[first]):.0%} of {first}'s states{verdict}"
    axes.set(xlabel=f"{unit} of states on the fullest rank, {moment}", title=title, xlim=(0, 1.03 * max(ends)))
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    each = "; ".join(
        f"{name} {total_bytes(bar) / size:.2f} {unit} predicted"
        + (f", {measured[name] / size:.2f} {unit} measured" if name in measured else "")
        for name, bar in bars.items()
    )
    return picture_of(figure, f"States of one rank {moment}, in {precision}: {each}.")


def _same(run: Run, strategy: str, ranks: int) -> bool:
    return (run.config.strategy, run.config.ranks) == (strategy, ranks)


def _measured(strategies: Mapping[str, int], runs: Sequence[Run], moment: str) -> dict[str, int]:
    measured = {}
    for strategy, ranks in strategies.items():
        for run in runs:
            if _same(run, strategy, ranks) and run.memory:
                measured[strategy] = max(sum(rank[moment].get(owner, 0) for owner in OWNERS) for rank in run.memory)
    return measured


def paper_bars(parameters: float = 7.5e9, ranks: int = 64) -> Picture:
    """Draw figure 1 of Rajbhandari et al. 2020 (ZeRO): model states per rank for each stage, in
    bytes.

    The paper's formula counts 2 bytes per weight, 2 per gradient, 4 per fp32 master and 8 for
    Adam's two averages.
    """
    figure, axes = figure_of(7.6, 2.6)
    totals = [paper_formula(parameters, ranks, stage) for stage in range(len(STAGES))]
    size, unit = unit_for(totals[0])
    held = {
        owner: [each * parameters / (ranks if stage >= first else 1) / size for stage in range(len(STAGES))]
        for owner, (each, first) in STATES.items()
    }
    for stage, end in enumerate(stacked_bars(axes, STAGES, held, OWNER_COLOURS)):
        axes.text(end, stage, f" {end:,.1f} {unit}", va="center", fontsize=9)
    for bar in axes.patches:
        bar.set_linewidth(0)  # an edge would hide the thin slices
    saved = (totals[0] - totals[1]) / (totals[0] - totals[3])
    title = f"{parameters / 1e9:g} billion parameters on {ranks} ranks: stage 1 saves {saved:.0%} of what stage 3 does"
    axes.set(xlabel=f"{unit} of model states on one rank (the paper's formula)", title=title)
    axes.set_xlim(0, 1.12 * totals[0] / size)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    each = "; ".join(f"{name} {total / size:,.1f} {unit}" for name, total in zip(STAGES, totals, strict=True))
    return picture_of(figure, f"Model states of one rank: {each}.")


def against_ranks(shapes: Shapes, precision: str, most_ranks: int = 64) -> Picture:
    """Draw the predicted states of the fullest rank after backward against the number of ranks."""
    counts = [1]
    while counts[-1] * 2 <= most_ranks:
        counts.append(counts[-1] * 2)
    figure, axes = figure_of(7.6, 3.8)
    curves = {
        strategy: [
            max(total_bytes(rank["after backward"]) for rank in predict_states(shapes, strategy, ranks, precision))
            for ranks in counts
        ]
        for strategy in STRATEGY_LINES
    }
    size, unit = unit_for(max(map(max, curves.values())))
    for strategy, curve in curves.items():
        axes.plot(counts, [held / size for held in curve], color="black", label=strategy, **STRATEGY_LINES[strategy])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    falls = curves["zero3"][-1] / curves["zero3"][0]
    title = f"From 1 to {counts[-1]} ranks zero3 falls to {falls:.0%}; its buckets do not shrink"
    axes.set(xlabel="ranks", ylabel=f"{unit} of states on the fullest rank", ylim=(0, None), title=title)
    axes.legend(frameon=False)
    ends = "; ".join(f"{name} {curve[0] / size:.2f} to {curve[-1] / size:.2f} {unit}" for name, curve in curves.items())
    return picture_of(figure, f"States per rank after backward, from 1 to {counts[-1]} ranks: {ends}.")


def partition_map(shapes: Shapes, ranks: int) -> Picture:
    """Draw which rank owns which slice of each parameter at stages 1 and 2, one lane per param
    group.

    Boxes are parameters in the optimizer's order, shades are ranks in turn. A parameter that
    crosses a border between ranks is hatched (both ranks keep its whole gradient); padding is white.
    """
    from matplotlib.patches import Patch

    figure, axes = figure_of(8.6, 0.9 + 0.85 * len(shapes.groups))
    straddlers = padded = 0
    for lane, group in enumerate(shapes.groups):
        elements = sum(n for _, n in group)
        part = partition_size(elements, ranks)
        whole = part * ranks
        offset = 0
        for _, n in group:
            cuts = [offset, *(b for b in range(part, whole, part) if offset < b < offset + n), offset + n]
            straddlers += len(cuts) > 2
            for a, b in itertools.pairwise(cuts):
                box = {"left": a / whole, "height": 0.6}
                color = RANK_COLOURS[min(a // part, ranks - 1) % 2]
                axes.barh(lane, (b - a) / whole, color=color, edgecolor="white", linewidth=0.6, **box)
                if len(cuts) > 2:
                    axes.barh(lane, (b - a) / whole, color="none", edgecolor="black", linewidth=0, hatch="////", **box)
            offset += n
        if whole > elements:
            padded += whole - elements
            axes.barh(lane, (whole - elements) / whole, left=elements / whole, height=0.6, color="white")
        for border in range(1, ranks):
            axes.plot([border / ranks] * 2, [lane - 0.42, lane + 0.42], color="black", linewidth=1.5)
    names = [f"group {i}\n{len(group)} tensors" for i, group in enumerate(shapes.groups)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.8)
    axes.set(xlim=(0, 1), xlabel="share of the group's elements, in the optimizer's order")
    axes.set_title(f"Stages 1 and 2 ignore tensors: {straddlers} of {shapes.tensors} cross a border between ranks")
    for rank in range(ranks):
        axes.text((rank + 0.5) / ranks, -0.45, f"rank {rank}", ha="center", va="bottom", fontsize=9)
    key = Patch(facecolor="white", edgecolor="black", hatch="////", label="crosses a border: on two ranks or more")
    axes.legend(handles=[key], frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return picture_of(
        figure,
        f"{shapes.tensors} tensors in {len(shapes.groups)} param groups cut into {ranks} equal slices each: "
        f"{straddlers} tensors cross a border, {padded} elements are padding.",
    )


def communication(shapes: Shapes, precision: str, runs: Sequence[Run], accumulation: int = 8) -> Picture:
    """Draw the bytes that each rank sends per optimizer step.

    Left: predicted bars by operation with measured ticks, for each run. Right: how the bytes grow
    with the number of micro-batches per step, up to `accumulation`.
    """
    figure, (left, right) = figure_of(9.4, 1.9 + 0.4 * len(runs), ncols=2)
    predicted = {run.name: _predicted_traffic(shapes, run) for run in runs}
    totals = {run.name: bytes_sent(predicted[run.name], run.config.ranks) for run in runs}
    size, unit = unit_for(max(totals.values()))
    measured = {
        run.name: bytes_sent(moved, run.config.ranks)
        for run in runs
        if run.config.ranks > 1 and run.memory and (moved := run.memory[0].get("communication"))
    }
    _bars_by_operation(left, runs, predicted, size)
    mark_measured(left, [(i, measured[r.name] / size) for i, r in enumerate(runs) if r.name in measured])
    left.set(xlabel=f"{unit} sent by each rank in one step", xlim=(0, 1.05 * max(totals.values()) / size or 1))
    left.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    counts = range(1, accumulation + 1)
    ranks = max(run.config.ranks for run in runs)
    curves = {
        strategy: [bytes_sent(predict_traffic(shapes, strategy, ranks, precision, n), ranks) / size for n in counts]
        for strategy in STRATEGY_LINES
    }
    for strategy, curve in curves.items():
        right.plot(list(counts), curve, color="black", linewidth=1, label=strategy, **STRATEGY_LINES[strategy])
    right.set(xlabel="micro-batches per step", ylabel=f"{unit} per step, predicted", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    ratio = curves["zero2"][-1] / curves["zero1"][-1] if curves["zero1"][-1] else 1
    figure.suptitle(
        f"With {accumulation} micro-batches per step ZeRO-2 sends {ratio:.1f} times what ZeRO-1 sends", fontsize=11
    )
    each = "; ".join(
        f"{run.name} {_amount(totals[run.name] / size, unit)} predicted"
        + (f", {measured[run.name] / size:.2f} {unit} measured" if run.name in measured else "")
        for run in runs
    )
    ends = ", ".join(f"{strategy} {curve[-1]:,.0f} {unit}" for strategy, curve in curves.items())
    return picture_of(
        figure,
        f"Bytes that each rank sends per optimizer step: {each}. With {accumulation} micro-batches per step: {ends}.",
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if value else "nothing"


def _bars_by_operation(axes: Any, runs: Sequence[Run], predicted: Mapping[str, Mapping[str, int]], size: float) -> None:
    """Draw a bar of sent bytes per run, hatched by operation; one process sends nothing."""
    parts = {
        operation: [bytes_sent({operation: predicted[run.name][operation]}, run.config.ranks) / size for run in runs]
        for operation in OPERATIONS
    }
    ends = stacked_bars(axes, [in_figure(run.name) for run in runs], parts, OPERATION_COLOURS)
    for bars in axes.containers:
        for bar in bars:
            bar.set_hatch(OPERATION_HATCHES[bars.get_label()])
    axes.set_yticks(range(len(runs)), [in_figure(run.name) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    for row, end in enumerate(ends):
        if not end:
            axes.text(0, row, " 0", va="center", fontsize=9)


def _predicted_traffic(shapes: Shapes, run: Run) -> dict[str, int]:
    config = run.config
    return predict_traffic(shapes, config.strategy, config.ranks, run.precision, config.accumulation, run.deepspeed)
