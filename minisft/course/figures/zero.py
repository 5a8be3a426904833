"""Figures of ZeRO's memory and communication, predicted by `minisft.zero` or measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import PALETTE, Picture, figure_of, in_figure, mark_measured, picture_of, stacked_bars
from minisft.run.folder import Run
from minisft.text import unit_for
from minisft.zero.communication import OPERATIONS, bytes_sent, predict_traffic
from minisft.zero.parameter_shapes import Shapes, partition_size
from minisft.zero.planner import RESERVED, Plan
from minisft.zero.state_memory import MOMENTS, OWNERS, paper_formula, predict_states, total_bytes

STAGES = ("nothing split", "ZeRO-1: optimizer states", "ZeRO-2: and gradients", "ZeRO-3: and parameters")


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

    The paper's formula counts 2 bytes per weight, 2 per gradient and 12 per Adam state with its
    fp32 master.
    """
    parts = {"parameters": 2.0, "gradients": 2.0, "optimizer states": 12.0}
    figure, axes = figure_of(7.6, 2.6)
    size, unit = unit_for(paper_formula(parameters, ranks, 0))
    held = {
        owner: [bytes_each * parameters / (ranks if stage >= split_from else 1) / size for stage in range(len(STAGES))]
        for split_from, (owner, bytes_each) in zip((3, 2, 1), parts.items(), strict=True)
    }
    for stage, end in enumerate(stacked_bars(axes, STAGES, held, OWNER_COLOURS)):
        axes.text(end, stage, f" {end:,.1f} {unit}", va="center", fontsize=9)
    whole, least = paper_formula(parameters, ranks, 0), paper_formula(parameters, ranks, 3)
    title = f"{parameters / 1e9:g} billion parameters on {ranks} ranks: from {whole / size:,.0f} to {least / size:,.1f}"
    axes.set(xlabel=f"{unit} of model states on one rank (the paper's formula)", title=f"{title} {unit}")
    axes.set_xlim(0, 1.12 * whole / size)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    each = "; ".join(
        f"{name} {paper_formula(parameters, ranks, i) / size:,.1f} {unit}" for i, name in enumerate(STAGES)
    )
    return picture_of(figure, f"Model states of one rank: {each}.")


def against_ranks(shapes: Shapes, precision: str, most_ranks: int = 64) -> Picture:
    """Draw the predicted states of the fullest rank after backward against the number of ranks."""
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
        style = "--" if strategy == "zero2" else "-"  # dashed, since its curve coincides with zero1's
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
    """Draw which rank owns which slice of each parameter at stages 1 and 2, one lane per param
    group.

    Boxes are parameters in the optimizer's order and colors are owners. A parameter that crosses a
    border between ranks is hatched (both ranks keep its whole gradient); padding is gray.
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
            offset += n
        if whole > elements:
            padded += whole - elements
            axes.barh(lane, (whole - elements) / whole, left=elements / whole, height=0.6, color="#BBBBBB")
        for border in range(1, ranks):
            axes.plot([border / ranks] * 2, [lane - 0.42, lane + 0.42], color="black", linewidth=1.5)
    names = [f"group {i}\n{len(group)} tensors" for i, group in enumerate(shapes.groups)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the group's elements, in the optimizer's order")
    axes.set_title(f"Stages 1 and 2 ignore tensors: {straddlers} of {shapes.tensors} cross a border between ranks")
    keys = [Patch(color=PALETTE[r % len(PALETTE)], label=f"rank {r}") for r in range(min(ranks, len(PALETTE)))]
    keys.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="crosses a border"))
    axes.legend(
        handles=keys, frameon=False, ncols=len(keys), fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.3)
    )
    return picture_of(
        figure,
        f"{shapes.tensors} tensors in {len(shapes.groups)} param groups cut into {ranks} equal slices each: "
        f"{straddlers} tensors cross a border, {padded} elements are padding.",
    )


def communication(shapes: Shapes, precision: str, runs: Sequence[Run], accumulation: int = 8) -> Picture:
    """Draw the bytes that each rank sends per optimizer step.

    Left: predicted bars by operation with measured ticks, for each run with several ranks. Right:
    how the bytes grow with the number of micro-batches per step, up to `accumulation`.
    """
    runs = [run for run in runs if run.config.ranks > 1]
    figure, (left, right) = figure_of(9.4, 1.9 + 0.4 * len(runs), ncols=2)
    predicted = {run.name: _predicted_traffic(shapes, run) for run in runs}
    names = list(map(in_figure, predicted))
    size, unit = unit_for(
        max(bytes_sent(moved, run.config.ranks) for run, moved in zip(runs, predicted.values(), strict=True))
    )
    parts = {
        operation: [bytes_sent({operation: predicted[run.name][operation]}, run.config.ranks) / size for run in runs]
        for operation in OPERATIONS
    }
    bar_ends = stacked_bars(left, names, parts, dict(zip(OPERATIONS, PALETTE, strict=False)))
    measured = {
        run.name: bytes_sent(moved, run.config.ranks)
        for run in runs
        if run.memory and (moved := run.memory[0].get("communication"))
    }
    mark_measured(left, [(i, measured[r.name] / size) for i, r in enumerate(runs) if r.name in measured])
    left.set(xlabel=f"{unit} sent by each rank in one step", xlim=(0, 1.05 * max(*bar_ends, 1e-9)))
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
    """Draw the GPU memory that each strategy of a plan needs against what the GPU has; highlight
    the best.

    `gpu_bytes` is the GPU's memory in bytes; the dashed line is that less `RESERVED`.
    """
    figure, axes = figure_of(7.6, 1.0 + 0.45 * len(found.options))
    size, unit = unit_for(gpu_bytes)
    names = [option.strategy for option in found.options]
    chosen = found.best.strategy if found.best else None
    edge = 2 * gpu_bytes / size  # longer bars (over two GPUs) are cut there and marked with a gap
    shown = [min(option.total / size, edge) for option in found.options]
    widest = max(*shown, edge / 2)
    axes.axvline((gpu_bytes - RESERVED) / size, color="black", linestyle="--", linewidth=1)
    for i, (option, end) in enumerate(zip(found.options, shown, strict=True)):
        color = PALETTE[2] if option.strategy == chosen else PALETTE[0] if option.fits else "#BBBBBB"
        axes.barh(i, end, color=color, edgecolor="white")
        if option.total / size > edge:
            axes.barh(i, widest / 120, left=edge * 0.95, color="white")
        verdict = f"{option.left / size:,.1f} {unit} left" if option.fits else "does not fit"
        text = f"{option.total / size:,.1f} {unit}: {verdict}"
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(end + widest / 60, i, text, va="center", fontsize=8, bbox=background)
    title = f"{chosen} is the cheapest that fits" if chosen else "Nothing fits"
    dashed = f"{unit} of one GPU (dashed: usable)"
    if any(option.total / size > edge for option in found.options):
        dashed += f"; bars with a gap are longer than {edge:,.0f} {unit}"
    axes.set(xlim=(0, 1.5 * widest), xlabel=dashed, title=title)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    each = "; ".join(
        f"{o.strategy} {o.total / size:,.1f} {unit}" + ("" if o.fits else ", too much") for o in found.options
    )
    return picture_of(figure, f"Memory that each strategy needs of a GPU of {gpu_bytes / size:,.0f} {unit}: {each}.")
