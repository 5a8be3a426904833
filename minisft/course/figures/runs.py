"""Figures of training runs: losses, measured memory, and a comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisft.drawing import PALETTE, Picture, figure_of, in_figure, legend_below, picture_of, run_style, stacked_bars
from minisft.launch.compare_runs import (
    fastest_runs,
    join_names,
    least_state_memory,
    model_states,
    speed_quartiles,
    step_speeds,
    summary_rows,
)
from minisft.run.folder import Run
from minisft.text import in_gigabytes
from minisft.zero.measured_memory import OTHER

# Tol's "muted" scheme (https://personal.sron.nl/~pault), for owners of bytes alone; runs have those of `PALETTE`.
OWNER_COLOURS = {
    "parameters": "#332288",
    "gradients": "#44AA99",
    "fp32 masters": "#88CCEE",
    "optimizer states": "#DDCC77",
    "buckets": "#CC6677",
    "persistent parameters": "#882255",
    "offload buffers": "#999933",
    OTHER: "#BBBBBB",
}


def loss_curves(runs: Sequence[Run]) -> Picture:
    """Draw the loss of all runs against steps, and below it each run's relative distance from the
    first.
    """
    curves = {run.name: [m["loss"] for m in run.metrics] for run in runs}
    steps = min(map(len, curves.values()))
    first = next(iter(curves.values()))[:steps]
    distances = {n: [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(c, first, strict=False)] for n, c in curves.items()}
    worst = max(max(a) for a in distances.values())
    verdict = "lie on each other" if worst < 1e-3 else "differ"
    figure, (top, bottom) = figure_of(7.6, 5.0, nrows=2, sharex=True, height_ratios=[2.2, 1])
    # Later curves are thinner, so curves that coincide all stay visible.
    for i, (name, curve) in enumerate(curves.items()):
        width = 9 - 7.5 * i / max(1, len(curves) - 1)
        x = range(1, len(curve) + 1)
        top.plot(x, curve, color=PALETTE[i % 7], linewidth=width, label=in_figure(name), solid_capstyle="round")
        if i:
            bottom.plot(x[:steps], [max(a, 1e-9) for a in distances[name]], color=PALETTE[i % 7], marker="o")
    base = next(iter(curves))
    top.set(ylabel="loss (nats per trained token)", title=f"{len(runs)} strategies, one loss: the curves {verdict}")
    top.legend(frameon=False)
    bottom.axhline(1e-3, color="#888888", linestyle=":", linewidth=1)
    bottom.set(yscale="log", ylim=(3e-10, 1), xlabel="optimizer step")
    bottom.set_ylabel(f"relative distance\nfrom {in_figure(base)}")
    first_to_last = f"from {first[0]:.2f} to {first[-1]:.2f} in {steps} steps"
    return picture_of(
        figure,
        f"Loss curves of {', '.join(curves)}: {base} goes {first_to_last}; "
        f"the largest relative distance of any other run from it is {worst:.1e}.",
    )


def comparison(runs: Sequence[Run]) -> Picture:
    """Draw runs side by side: loss by step and by time, the speeds of their steps, and memory and
    traffic of the rank with the most.
    """
    rows = {row["run"]: row for row in summary_rows(runs)}
    colors = {run.name: PALETTE[i % 7] for i, run in enumerate(runs)}
    figure, axes = figure_of(10, 6, nrows=2, ncols=3)
    (by_step, by_time, speeds), (states, peaks, traffic) = axes
    for i, run in enumerate(runs):
        losses = [m["loss"] for m in run.metrics]
        seconds = [sum(m["seconds"] for m in run.metrics[: n + 1]) for n in range(len(losses))]
        by_step.plot([m["step"] for m in run.metrics], losses, label=in_figure(run.name), **run_style(i, len(runs)))
        by_time.plot(seconds, losses, color=colors[run.name], linewidth=1.8)
    by_step.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    by_time.set(xlabel="seconds of training", ylabel="loss")
    panels = (
        (states, "model_state_bytes", 1e9, "GB of states per rank"),
        (peaks, "peak_bytes", 1e9, "GB per rank at its peak"),
        (traffic, "sent_bytes", 1e9, "GB sent per rank and step"),
    )
    for panel, key, size, label in panels:
        values = [(row[key] or 0) / size for row in rows.values()]
        panel.barh(list(map(in_figure, rows)), values, color=list(colors.values()))
        panel.set(xlabel=label, xlim=(0, 1.25 * max(*values, 1e-9)))
        panel.invert_yaxis()
        panel.tick_params(axis="y", labelsize=8)
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.2f}", va="center", fontsize=8)
    _draw_speeds(speeds, runs, list(colors.values()))
    legend_below(figure, by_step)
    fastest = list(map(in_figure, fastest_runs(runs)))
    was = "no strategy was measurably faster"
    if 0 < len(fastest) < len(runs):
        was = f"{join_names(fastest)} {'was' if len(fastest) == 1 else 'were'} the fastest"
    lightest = least_state_memory(list(rows.values()))
    least = f", and {join_names(list(map(in_figure, lightest)))} held the least between steps" if lightest else ""
    figure.suptitle(f"On this machine {was}{least}")
    each = "; ".join(
        f"{name} {row['tokens_per_second'] or 0:,.0f} tokens/s{middle}, "
        f"{in_gigabytes(row['model_state_bytes'])} of states, "
        f"{in_gigabytes(row['peak_bytes'])} at the peak, {in_gigabytes(row['sent_bytes'])} sent per step"
        for (name, row), middle in zip(rows.items(), map(_middle_half, runs), strict=True)
    )
    return picture_of(figure, f"Runs side by side: {each}.")


def _middle_half(run: Run) -> str:
    quartiles = speed_quartiles(run)
    return f" (half of its steps between {quartiles[0]:,.0f} and {quartiles[2]:,.0f})" if quartiles else ""


def _draw_speeds(axes: Any, runs: Sequence[Run], colors: Sequence[str]) -> None:
    """Draw a dot for each step, and a bar between the quartiles of each run's steps."""
    for y, (run, color) in enumerate(zip(runs, colors, strict=True)):
        if quartiles := speed_quartiles(run):
            low, middle, high = quartiles
            axes.barh(y, high - low, left=low, height=0.5, color=color, alpha=0.5)
            axes.plot([middle] * 2, [y - 0.25, y + 0.25], color=color, linewidth=3)
        step_rates = step_speeds(run)
        axes.plot(step_rates, [y] * len(step_rates), "o", color="black", markersize=3)
    axes.set_yticks(range(len(runs)), [in_figure(run.name) for run in runs], fontsize=8)
    axes.set(xlabel="tokens/s: steps (dots), quartiles (bar)", ylim=(len(runs) - 0.4, -0.6))
    axes.set_xlim(left=0)


def memory_bars(runs: Sequence[Run]) -> Picture:
    """Draw the measured bytes of each run's fullest rank between two steps, by owner."""
    figure, axes = figure_of(7.6, 0.9 + 0.55 * len(runs))
    drawn = [in_figure(run.name) for run in runs]
    names = [f"{name} ({r.config.ranks} rank{'s' * (r.config.ranks > 1)})" for name, r in zip(drawn, runs, strict=True)]
    ranks = [max(run.memory, key=model_states, default={}) for run in runs]
    parts = {owner: [rank.get("at rest", {}).get(owner, 0) / 1e9 for rank in ranks] for owner in OWNER_COLOURS}
    left = stacked_bars(axes, names, parts, OWNER_COLOURS)
    least = min(left)
    lightest = " and ".join(name for name, total in zip(drawn, left, strict=True) if total < 1.01 * least)
    title = f"{lightest} hold {least:.2f} GB on each rank, {drawn[0]} {left[0]:.2f} GB"
    axes.set(xlabel="GB on one rank between two steps (measured)", title=title)
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    others = [rank.get("at rest", {}).get(OTHER, 0) for rank in ranks]
    each = "; ".join(
        f"{run.name} {model_states(rank) / 1e9:.2f} GB of model states and {other / 1e9:.2f} GB of other tensors"
        for run, rank, other in zip(runs, ranks, others, strict=True)
    )
    return picture_of(figure, f"Memory of one rank, measured: {each}.")


def before_and_after(summaries: Sequence[dict[str, Any]]) -> Picture:
    """Draw the test loss and the share of answers that stop against steps, from runs'
    `summary.json`.
    """
    figure, (left, right) = figure_of(8.2, 3.4, ncols=2)
    for i, summary in enumerate(summaries):
        steps = [c["step"] for c in summary["checkpoints"]]
        style = run_style(i, len(summaries)) | {"label": in_figure(summary["run"])}
        for axes, key, scale in ((left, "loss", 1), (right, "stopped", 100)):
            values = [scale * c[key] for c in summary["checkpoints"]]
            axes.plot(steps, values, marker="o", **style)
    first, last = summaries[0]["checkpoints"][0], summaries[0]["checkpoints"][-1]
    verdict = "falls" if last["loss"] < first["loss"] else "does not fall"
    change = 100 * (last["stopped"] - first["stopped"])
    left.set(xlabel="optimizer step", ylabel="loss on test answers", title=f"The test loss {verdict}")
    learns = "The model learns to stop" if change > 0 else "The model does not learn to stop"
    right.set(xlabel="optimizer step", ylabel="answers that stop by themselves, %", ylim=(-3, 103), title=learns)
    left.legend(frameon=False)
    return picture_of(
        figure,
        f"Test loss of {summaries[0]['run']} from {first['loss']:.2f} to {last['loss']:.2f}; answers that stop by "
        f"themselves from {first['stopped']:.0%} to {last['stopped']:.0%}; "
        f"{len(summaries)} strategies drawn on the same axes.",
    )
