"""The figures on ZeRO's memory: each from numbers that `zero_memory` predicts or a run has measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import PALETTE, Picture, figure_of, in_figure, picture_of
from minisft.run.folder import Run
from minisft.zero.activation_trace import ACTIVATIONS, BACKWARD, LOGITS
from minisft.zero.communication import OPERATIONS, bytes_sent, predict_traffic
from minisft.zero.peak_memory import STEP_OWNER
from minisft.zero.planner import RESERVED, Plan
from minisft.zero.state_memory import (
    MOMENTS,
    OWNERS,
    Shapes,
    paper_formula,
    partition_size,
    predict_states,
    total_bytes,
)

STAGES = ("nothing split", "ZeRO-1: optimizer states", "ZeRO-2: and gradients", "ZeRO-3: and parameters")
STEP_COLOURS = OWNER_COLOURS | {ACTIVATIONS: "#7A5195", LOGITS: "#B7A1D6", BACKWARD: "#444444", STEP_OWNER: "#888888"}
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def unit_for(largest: float) -> tuple[float, str]:
    """A unit in which `largest` bytes are a number people read: (bytes, name)."""
    return next(((size, name) for size, name in UNITS if largest >= size), (1.0, "bytes"))


def predicted_bars(
    shapes: Shapes,
    strategies: Mapping[str, int],
    precision: str,
    moment: str = "after backward",
    runs: Sequence[Run] = (),
) -> Picture:
    """Predicted bytes of the fullest rank, one bar per strategy (given with its ranks), by owner.

    A tick marks what a run of that strategy and number of ranks, if one is among `runs`, has measured.
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
    left = [0.0] * len(bars)
    names = [f"{name} ({ranks} rank{'s' if ranks > 1 else ''})" for name, ranks in strategies.items()]
    for owner in OWNERS:
        sizes = [bar[owner] / size for bar in bars.values()]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=OWNER_COLOURS[owner], label=owner, edgecolor="white")
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    measured = _measured(strategies, runs, moment)
    for i, strategy in enumerate(strategies):
        if strategy in measured:
            label = "measured" if strategy == next(iter(measured)) else None
            axes.plot([measured[strategy] / size] * 2, [i - 0.46, i + 0.46], color="black", linewidth=2, label=label)
    verdict = ""
    if measured:
        worst = max(abs(held - total_bytes(bars[strategy])) for strategy, held in measured.items())
        verdict = ", measured to the byte" if not worst else f", measured within {worst:,} bytes"
    first, least = next(iter(bars)), min(map(total_bytes, bars.values()))
    lightest = [name for name, bar in bars.items() if total_bytes(bar) == least]
    does = "hold" if len(lightest) > 1 else "holds"
    title = f"{' and '.join(lightest)} {does} {least / total_bytes(bars[first]):.0%} of {first}'s states{verdict}"
    axes.set(xlabel=f"{unit} of states on the fullest rank, {moment}", title=title, xlim=(0, 1.03 * max(left)))
    axes.invert_yaxis()
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
    found = {}
    for strategy, ranks in strategies.items():
        for run in runs:
            if _same(run, strategy, ranks) and run.memory:
                found[strategy] = max(sum(rank[moment].get(owner, 0) for owner in OWNERS) for rank in run.memory)
    return found


def paper_bars(parameters: float = 7.5e9, ranks: int = 64) -> Picture:
    """Figure 1 of Rajbhandari et al. 2020: model states per rank for each stage, by the paper's formula."""
    parts = {"parameters": 2.0, "gradients": 2.0, "optimizer states": 12.0}
    figure, axes = figure_of(7.6, 2.6)
    size, unit = unit_for(paper_formula(parameters, ranks, 0))
    for stage, name in enumerate(STAGES):
        left = 0.0
        for split_from, (owner, bytes_each) in zip((3, 2, 1), parts.items(), strict=True):
            held = bytes_each * parameters / (ranks if stage >= split_from else 1) / size
            label = owner if stage == 0 else None
            axes.barh(name, held, left=left, color=OWNER_COLOURS[owner], label=label, edgecolor="white")
            left += held
        axes.text(left, stage, f" {left:,.1f} {unit}", va="center", fontsize=9)
    whole, least = paper_formula(parameters, ranks, 0), paper_formula(parameters, ranks, 3)
    title = f"{parameters / 1e9:g} billion parameters on {ranks} ranks: from {whole / size:,.0f} to {least / size:,.1f}"
    axes.set(xlabel=f"{unit} of model states on one rank (the paper's formula)", title=f"{title} {unit}")
    axes.set_xlim(0, 1.12 * whole / size)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    each = "; ".join(
        f"{name} {paper_formula(parameters, ranks, i) / size:,.1f} {unit}" for i, name in enumerate(STAGES)
    )
    return picture_of(figure, f"Model states of one rank: {each}.")


def against_ranks(shapes: Shapes, precision: str, most_ranks: int = 64) -> Picture:
    """Predicted states of the fullest rank after backward, against the number of ranks, one curve per strategy."""
    counts = [1]
    while counts[-1] * 2 <= most_ranks:
        counts.append(counts[-1] * 2)
    figure, axes = figure_of(7.6, 3.8)
    strategies = ("ddp", "zero1", "zero2", "zero3")
    curves = {
        strategy: [
            max(total_bytes(rank["after backward"]) for rank in predict_states(shapes, strategy, ranks, precision))
            for ranks in counts
        ]
        for strategy in strategies
    }
    size, unit = unit_for(max(map(max, curves.values())))
    for i, (strategy, curve) in enumerate(curves.items()):
        style = "--" if strategy == "zero2" else "-"  # at rest and after backward it holds what zero1 does
        axes.plot(counts, [held / size for held in curve], style, marker="o", color=PALETTE[i], label=strategy)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    falls = curves["zero3"][-1] / curves["zero3"][0]
    title = f"From 1 to {counts[-1]} ranks zero3 falls to {falls:.0%}; its buckets do not shrink"
    axes.set(xlabel="ranks", ylabel=f"{unit} of states on the fullest rank", ylim=(0, None), title=title)
    axes.legend(frameon=False)
    ends = "; ".join(f"{name} {curve[0] / size:.2f} to {curve[-1] / size:.2f} {unit}" for name, curve in curves.items())
    return picture_of(figure, f"States per rank after backward, from 1 to {counts[-1]} ranks: {ends}.")


def partition_map(shapes: Shapes, ranks: int) -> Picture:
    """Which rank owns which slice of which parameter at stages 1 and 2, one lane per param group.

    Boxes are parameters in the optimizer's order, colours are owners, and what lies over a border (its whole gradient
    is kept by both sides) is hatched; padding is grey.
    """
    from matplotlib.patches import Patch

    figure, axes = figure_of(8.6, 0.9 + 0.85 * len(shapes.groups))
    straddlers = padded = 0
    for lane, group in enumerate(shapes.groups):
        elements = sum(n for _, n in group)
        part = partition_size(elements, ranks)
        whole = part * ranks
        at = 0
        for _, n in group:
            cuts = [at, *(b for b in range(part, whole, part) if at < b < at + n), at + n]
            straddlers += len(cuts) > 2
            for a, b in itertools.pairwise(cuts):
                axes.barh(
                    lane,
                    (b - a) / whole,
                    left=a / whole,
                    height=0.6,
                    color=PALETTE[min(a // part, ranks - 1) % len(PALETTE)],
                    edgecolor="white",
                    linewidth=0.6,
                    hatch="////" if len(cuts) > 2 else None,
                )
            at += n
        if whole > elements:
            padded += whole - elements
            axes.barh(lane, (whole - elements) / whole, left=elements / whole, height=0.6, color="#BBBBBB")
        for border in range(1, ranks):
            axes.plot([border / ranks] * 2, [lane - 0.42, lane + 0.42], color="black", linewidth=1.5)
    names = [f"group {i}\n{len(group)} tensors" for i, group in enumerate(shapes.groups)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the group's elements, in the optimizer's order")
    axes.set_title(f"Stages 1 and 2 ignore tensors: {straddlers} of {shapes.tensors} lie over a border between ranks")
    keys = [Patch(color=PALETTE[r % len(PALETTE)], label=f"rank {r}") for r in range(min(ranks, len(PALETTE)))]
    keys.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="over a border"))
    axes.legend(
        handles=keys, frameon=False, ncols=len(keys), fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.3)
    )
    return picture_of(
        figure,
        f"{shapes.tensors} tensors in {len(shapes.groups)} param groups cut into {ranks} equal slices each: "
        f"{straddlers} tensors lie over a border, {padded} elements are padding.",
    )


def step_timeline(memory: Mapping[str, Any], name: str) -> Picture:
    """Tensors alive through one step of a rank, and who holds them at the worst moment.

    `memory` is an entry of the memory of a run that was made with `memory_timeline`.
    """
    step = memory["step"]
    begin = next(i for i, (_, held) in enumerate(step["timeline"]) if held == step["before"])
    totals = [(phase, held + step["unseen"]) for phase, held in step["timeline"][begin:]]
    size, unit = unit_for(max(held for _, held in totals))
    figure, (axes, column) = figure_of(9.4, 3.6, ncols=2, width_ratios=(4, 1))
    colours = {"forward": PALETTE[0], "backward": PALETTE[1], "step": PALETTE[2]}
    begin = 0
    before = step["before"] + step["unseen"]
    for i in range(1, len(totals) + 1):
        if i == len(totals) or totals[i][0] != totals[begin][0]:
            phase = totals[begin][0]
            known = {line.get_label() for line in axes.lines}
            label = phase if phase not in known else None
            values = [held / size for _, held in totals[max(0, begin - 1) : i]]
            x = range(max(0, begin - 1), i)
            axes.plot(x, values, color=colours.get(phase, PALETTE[6]), linewidth=1.2, label=label)
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
        colour = STEP_COLOURS.get(owner, "#BBBBBB")
        column.bar(0, held / size, bottom=bottom, width=0.8, color=colour, edgecolor="white")
        if held > 0.03 * peak:
            text = f"{in_figure(owner)}  {held / size:.2f}"
            column.text(0.5, bottom + held / size / 2, text, va="center", fontsize=8)
        bottom += held / size
    column.set(xlim=(-0.5, 3.2), ylim=axes.get_ylim(), xticks=[0], xticklabels=["at the peak"], yticks=[])
    column.spines[["left", "bottom"]].set_visible(False)
    most = next(iter(owners))
    figure.suptitle(
        f"{in_figure(name)} holds the most in {_phase(phase)}, {peak / before:.1f} times what is there between steps: "
        f"{owners[most] / peak:.0%} of it are {in_figure(most)}",
        fontsize=11,
    )
    each = ", ".join(f"{held / size:.2f} {unit} {owner}" for owner, held in owners.items())
    return picture_of(
        figure,
        f"Bytes of tensors through one step of {name}: {before / size:.2f} {unit} before it, at most "
        f"{peak / size:.2f} {unit}, in {_phase(phase)}: {each}.",
    )


def communication(shapes: Shapes, precision: str, runs: Sequence[Run], accumulation: int = 8) -> Picture:
    """Bytes that each rank sends per optimizer step: predicted bars by operation with measured ticks, one per run that
    has several ranks; beside it, how they grow with the micro-batches per step, up to `accumulation`."""
    runs = [run for run in runs if run.config.ranks > 1]
    figure, (left, right) = figure_of(9.4, 1.9 + 0.4 * len(runs), ncols=2)
    predicted = {run.name: _predicted_traffic(shapes, run) for run in runs}
    names = list(map(in_figure, predicted))
    size, unit = unit_for(
        max(bytes_sent(moved, run.config.ranks) for run, moved in zip(runs, predicted.values(), strict=True))
    )
    edge = [0.0] * len(runs)
    for i, operation in enumerate(OPERATIONS):
        sizes = [bytes_sent({operation: predicted[run.name][operation]}, run.config.ranks) / size for run in runs]
        if any(sizes):
            left.barh(names, sizes, left=edge, color=PALETTE[i], label=operation, edgecolor="white")
            edge = [a + b for a, b in zip(edge, sizes, strict=True)]
    measured = {}
    for i, run in enumerate(runs):
        if run.memory and (moved := run.memory[0].get("communication")):
            measured[run.name] = bytes_sent(moved, run.config.ranks)
            label = "measured" if len(measured) == 1 else None
            left.plot([measured[run.name] / size] * 2, [i - 0.46, i + 0.46], color="black", linewidth=2, label=label)
    left.set(xlabel=f"{unit} sent by each rank in one step", xlim=(0, 1.05 * max(*edge, 1e-9)))
    left.invert_yaxis()
    left.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    counts = range(1, accumulation + 1)
    ranks = max(run.config.ranks for run in runs)
    curves = {
        strategy: [bytes_sent(predict_traffic(shapes, strategy, ranks, precision, n), ranks) / size for n in counts]
        for strategy in ("ddp", "zero1", "zero2", "zero3")
    }
    for i, (strategy, curve) in enumerate(curves.items()):
        style = "--" if strategy == "zero1" else "-"
        right.plot(list(counts), curve, style, marker="o", markersize=3, color=PALETTE[i], label=strategy)
    right.set(xlabel="micro-batches per step", ylabel=f"{unit} per step, predicted", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    once, again = (
        bytes_sent(predict_traffic(shapes, s, ranks, precision, accumulation), ranks) for s in ("zero1", "zero2")
    )
    figure.suptitle(
        f"With {accumulation} micro-batches per step ZeRO-2 sends {again / once:.1f} times what ZeRO-1 sends",
        fontsize=11,
    )
    each = "; ".join(
        f"{run.name} {bytes_sent(predicted[run.name], run.config.ranks) / size:.2f} {unit} predicted"
        + (f", {measured[run.name] / size:.2f} {unit} measured" if run.name in measured else "")
        for run in runs
    )
    ends = ", ".join(f"{strategy} {curve[-1]:,.0f} {unit}" for strategy, curve in curves.items())
    return picture_of(
        figure,
        f"Bytes that each rank sends per optimizer step: {each}. With {accumulation} micro-batches per step: {ends}.",
    )


def _predicted_traffic(shapes: Shapes, run: Run) -> dict[str, int]:
    config = run.config
    return predict_traffic(shapes, config.strategy, config.ranks, run.precision, config.accumulation, run.deepspeed)


def plan_bars(found: Plan, gpu_bytes: float) -> Picture:
    """What each strategy of a plan needs of a GPU, against what the GPU has; the chosen one stands out."""
    figure, axes = figure_of(7.6, 1.0 + 0.45 * len(found.options))
    size, unit = unit_for(gpu_bytes)
    names = [option.strategy for option in found.options]
    chosen = found.best.strategy if found.best else None
    edge = 2 * gpu_bytes / size  # what needs more than two GPUs is cut off there, and marked
    shown = [min(option.total / size, edge) for option in found.options]
    widest = max(*shown, edge / 2)
    axes.axvline((gpu_bytes - RESERVED) / size, color="black", linestyle="--", linewidth=1)
    for i, (option, end) in enumerate(zip(found.options, shown, strict=True)):
        colour = PALETTE[2] if option.strategy == chosen else PALETTE[0] if option.fits else "#BBBBBB"
        axes.barh(i, end, color=colour, edgecolor="white")
        if option.total / size > edge:
            axes.barh(i, widest / 120, left=edge * 0.95, color="white")
        verdict = f"{option.left / size:,.1f} {unit} left" if option.fits else "does not fit"
        words = f"{option.total / size:,.1f} {unit}: {verdict}"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(end + widest / 60, i, words, va="center", fontsize=8, bbox=behind)
    title = f"{chosen} is the cheapest that fits" if chosen else "Nothing fits"
    dashed = f"{unit} of one GPU (dashed: what it can give)"
    if any(option.total / size > edge for option in found.options):
        dashed += f"; bars with a gap are longer than {edge:,.0f} {unit}"
    axes.set(xlim=(0, 1.5 * widest), xlabel=dashed, title=title)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    each = "; ".join(
        f"{o.strategy} {o.total / size:,.1f} {unit}" + ("" if o.fits else ", too much") for o in found.options
    )
    return picture_of(figure, f"Memory that each strategy needs of a GPU of {gpu_bytes / size:,.0f} {unit}: {each}.")


def _phase(phase: str) -> str:
    return {"step": "the optimizer's step"}.get(phase, phase)
