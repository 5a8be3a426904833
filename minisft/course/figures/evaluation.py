"""Figures of evaluation results: scores over training, and how exactly a difference is known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisft.drawing import PALETTE, Picture, figure_of, in_figure, legend_below, picture_of
from minisft.evaluation.metrics import paired_bootstrap, tokenizer_for
from minisft.files import read_json
from minisft.run.folder import Run, outputs_root
from minisft.run.records import Summary

NAMES = {"BLEU": "bleu", "chrF": "chrf", "loss": "loss"}


def draw(runs: Sequence[Run]) -> Path | None:
    """Write `outputs/evaluation/scores.png` from these runs' last evaluations.

    Returns its path, or None if no run has been evaluated. Raises `UserError` for a damaged
    `summary.json`.
    """
    folder = outputs_root() / "evaluation"
    summaries = [summary for run in runs if (summary := read_json(folder / run.name / "summary.json", Summary))]
    if not summaries:
        return None
    import matplotlib

    matplotlib.rcdefaults()  # ignore a matplotlibrc in the current folder
    scores_over_steps(summaries).save(folder / "scores.png")
    return folder / "scores.png"


def scores_over_steps(summaries: Sequence[Summary]) -> Picture:
    """Draw BLEU, chrF and loss of every checkpoint of several runs; BLEU and chrF with 95%
    intervals.

    Runs whose scores coincide are drawn once, with all their names.
    """
    figure, axes = figure_of(10, 3.8, ncols=3)
    groups = _coinciding(summaries)
    for i, group in enumerate(groups):
        checkpoints: Sequence[Mapping[str, Any]] = group[0]["checkpoints"]
        steps = [c["step"] for c in checkpoints]
        # Shift each curve slightly, so that intervals do not hide each other.
        spread = 0.012 * max(steps) * (i - (len(groups) - 1) / 2)
        style = {"color": PALETTE[i % 7], "marker": "o", "markersize": 4, "linewidth": 1.4}
        style["label"] = ", ".join(in_figure(summary["run"]) for summary in group)
        for panel, key in zip(axes, NAMES.values(), strict=True):
            values = [c[key] for c in checkpoints]
            edges = [c.get(f"{key}_interval") or [] for c in checkpoints]
            if all(len(edge) == 2 for edge in edges):
                spans = [(max(0, v - low), max(0, high - v)) for v, (low, high) in zip(values, edges, strict=True)]
                panel.errorbar(
                    [s + spread for s in steps], values, yerr=list(zip(*spans, strict=True)), capsize=2, **style
                )
            else:
                panel.plot(steps, values, **style)
    for panel, label in zip(axes, ("BLEU (95% interval)", "chrF (95% interval)", "loss on the answers"), strict=True):
        panel.set(xlabel="optimizer step", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        if "loss" not in label:
            panel.set_ylim(bottom=0)
    legend_below(figure, axes[0])
    figure.suptitle(_message(summaries))
    each = "; ".join(
        f"{_names(group)} {', '.join(f'{name} {_from_to(group[0], key)}' for name, key in NAMES.items())}"
        for group in groups
    )
    return picture_of(figure, f"Scores over training: {each}.")


def _coinciding(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """Group the runs whose scores are equal at every checkpoint, to the digits that can be seen."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        checkpoints: Sequence[Mapping[str, Any]] = summary["checkpoints"]
        scores = [
            (c["step"], *(f"{v:.3f}" for key in NAMES.values() for v in (c[key], *c.get(f"{key}_interval", []))))
            for c in checkpoints
        ]
        groups.setdefault(str(scores), []).append(summary)
    return list(groups.values())


def _names(group: Sequence[Summary]) -> str:
    names = ", ".join(summary["run"] for summary in group)
    return f"{names} (equal scores)" if len(group) > 1 else names


def _from_to(summary: Summary, key: str) -> str:
    checkpoints: Sequence[Mapping[str, Any]] = summary["checkpoints"]
    first, last = checkpoints[0], checkpoints[-1]
    return f"from {first[key]:.2f} to {last[key]:.2f}"


def _message(summaries: Sequence[Summary]) -> str:
    """Return the title: whether the first run's BLEU intervals overlap, and whether its loss falls."""
    first, last = summaries[0]["checkpoints"][0], summaries[0]["checkpoints"][-1]
    fell = "the loss falls" if last["loss"] < first["loss"] else "the loss does not fall"
    rows = summaries[0]["rows"]
    if not (first["bleu_interval"] and last["bleu_interval"]):
        return f"{rows} answers: {fell}"
    if last["bleu_interval"][0] > first["bleu_interval"][1]:
        return f"{rows} answers: BLEU rises beyond its intervals, and {fell}"
    if last["bleu_interval"][1] < first["bleu_interval"][0]:
        return f"{rows} answers: BLEU falls beyond its intervals, and {fell}"
    return f"With {rows} answers BLEU's intervals before and after overlap; {fell}"


def interval_widths(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    points: float = 2.0,
    draws: int = 8,
    seed: int = 0,
) -> Picture:
    """Draw how exactly a BLEU difference is known from fewer questions, and how many questions it
    takes to know it to plus and minus `points`.

    `before` and `after` are two systems' answers to the same questions, in the same order, with
    keys `output` and `reference`. Each number of questions is sampled `draws` times without
    replacement; the paired bootstrap gives each sample's interval. The line falls with the square
    root of the number of questions, starting from the interval of all of them.
    """
    chance = random.Random(seed)  # noqa: S311 (samples questions; not a security use)
    questions = range(len(after))
    tokenize = tokenizer_for([answer["reference"] for answer in after])
    measured: list[tuple[int, float]] = []  # (number of questions, half the width in BLEU points)
    for size in [*(n for n in (4, 8, 16, 32, 64, 128, 256) if n < len(after)), len(after)]:
        for _ in range(draws if size < len(after) else 1):
            rows = sorted(chance.sample(questions, size))
            first, second = ([answers[i]["output"] for i in rows] for answers in (before, after))
            references = [after[i]["reference"] for i in rows]
            found = paired_bootstrap(first, second, references, tokenize=tokenize)
            measured.append((size, found.half_width))
    known = measured[-1][1]
    if not known:
        title = f"The two systems differ by {found.difference:.0f} points on every sample of these {len(after)} answers"
        return picture_of(_widths(measured, [], points, title), f"How exactly the BLEU difference is known: {title}.")
    needed = round(len(after) * (known / points) ** 2)
    line = [(n, known * (len(after) / n) ** 0.5) for n in (measured[0][0], max(needed, len(after)))]
    title = f"{len(after)} answers: ±{known:.1f} BLEU. "
    title += f"±{points:g} takes about {needed:,} answers"
    alt = f"Half the width of the paired 95% interval against the number of answers. {title}."
    return picture_of(_widths(measured, line, points, title), alt)


def _widths(measured: Sequence[tuple[int, float]], line: Sequence[tuple[int, float]], points: float, title: str) -> Any:
    """Draw measured points, and the line that they follow (none if nothing varies)."""
    figure, axes = figure_of(7.6, 3.6)
    axes.plot(*zip(*measured, strict=True), "o", color=PALETTE[0], alpha=0.6, label="samples of our answers (measured)")
    axes.set(xscale="log", xlabel="answers to the same questions", ylabel="BLEU difference known to ±")
    ticks = sorted({n for n, _ in (*measured, *line)})
    if line:
        axes.plot(*zip(*line, strict=True), color=PALETTE[1], linestyle="--", label="falls with the square root")
        axes.axhline(points, color="#888888", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_yticks([n for n in (0.5, 1, 2, 5, 10, 20, 50) if n <= 1.3 * max(y for _, y in (*measured, *line))])
    # Ticks where there are points, without those that would overlap.
    axes.set_xticks([n for n, following in zip(ticks, [*ticks[1:], 10**9], strict=True) if following > 1.15 * n])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
    axes.set(title=title)
    axes.legend(frameon=False)
    return figure
