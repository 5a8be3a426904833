"""Figures of evaluation results: scores over training, and the width of BLEU's interval."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisft.drawing import PALETTE, Picture, figure_of, in_figure, legend_below, picture_of
from minisft.evaluation.metrics import corpus_scores, tokenizer_for
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
    """
    figure, axes = figure_of(10, 3.8, ncols=3)
    for i, summary in enumerate(summaries):
        checkpoints: Sequence[Mapping[str, Any]] = summary["checkpoints"]
        steps = [c["step"] for c in checkpoints]
        # Shift each run slightly: runs with equal scores would hide each other's intervals.
        spread = 0.012 * max(steps) * (i - (len(summaries) - 1) / 2)
        for panel, key in zip(axes, NAMES.values(), strict=True):
            values = [c[key] for c in checkpoints]
            style = {"color": PALETTE[i % 7], "marker": "o", "markersize": 4, "linewidth": 1.4}
            style["label"] = in_figure(summary["run"])
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
        if "loss" not in label:
            panel.set_ylim(bottom=0)
    legend_below(figure, axes[0])
    figure.suptitle(_message(summaries))
    each = "; ".join(
        f"{s['run']} {', '.join(f'{name} {_from_to(s, key)}' for name, key in NAMES.items())}" for s in summaries
    )
    return picture_of(figure, f"Scores over training: {each}.")


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


def interval_widths(answers: Sequence[Mapping[str, Any]], draws: int = 8, seed: int = 0) -> Picture:
    """Draw how wide BLEU's 95% interval is for fewer answers, and how many answers 2 points would
    need.

    `answers` are those of one evaluation, with keys `output` and `reference`. Each size is sampled
    `draws` times without replacement; sacreBLEU's bootstrap gives each sample's width. The line
    falls with the square root of the number of answers, starting from the width for all of them.
    """
    chance = random.Random(seed)  # noqa: S311 (samples answers; not a security use)
    sizes = [n for n in (4, 8, 16, 32, 64, 128, 256) if n < len(answers)]
    tokenize = tokenizer_for([a["reference"] for a in answers])
    widths: list[tuple[int, float]] = []  # (number of answers, width in BLEU points)
    for size in [*sizes, len(answers)]:
        for _ in range(draws if size < len(answers) else 1):
            sample = chance.sample(list(answers), size)
            scores = corpus_scores([a["output"] for a in sample], [a["reference"] for a in sample], 300, tokenize)
            low, high = scores["bleu_interval"]
            widths.append((size, high - low))
    full_width = widths[-1][1]
    # The width falls with the square root of the number of answers.
    needed = round(len(answers) * (full_width / 2) ** 2)
    figure, axes = figure_of(7.6, 3.4)
    sizes_drawn, measured = zip(*widths, strict=True)
    axes.plot(sizes_drawn, measured, "o", color=PALETTE[0], alpha=0.6, label="samples of the answers (measured)")
    line = [max(1, sizes[0] if sizes else 1), max(needed, len(answers))]
    roots = [full_width * (len(answers) / n) ** 0.5 for n in line]
    title = f"{len(answers)} answers leave BLEU open by {full_width:.0f} points; 2 points would need about {needed:,}"
    if full_width > 0:
        axes.plot(line, roots, color=PALETTE[1], linestyle="--", label="falling with the square root of the number")
        axes.set(yscale="log")
    elif scores["bleu"]:
        title = f"BLEU is {scores['bleu']:.0f} for every sample of these {len(answers)} answers"
    else:
        title = f"None of {len(answers)} answers can be scored: no run of words matches its reference"
    axes.set(xscale="log", xlabel="answers", ylabel="width of the 95% interval, BLEU", title=title)
    axes.legend(frameon=False)
    return picture_of(figure, f"Width of BLEU's 95% interval against the number of answers: {title}.")
