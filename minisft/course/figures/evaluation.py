"""What evaluations found, as figures."""

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
    """Write the figure of these runs' last evaluations, `outputs/evaluation/scores.png`, if there is any."""
    folder = outputs_root() / "evaluation"
    found = [summary for run in runs if (summary := read_json(folder / run.name / "summary.json", Summary))]
    if not found:
        return None
    import matplotlib

    matplotlib.rcdefaults()  # the current folder's matplotlibrc is no part of this
    scores_over_steps(found).save(folder / "scores.png")
    return folder / "scores.png"


def scores_over_steps(summaries: Sequence[Summary]) -> Picture:
    """BLEU, chrF and the loss of every checkpoint of several runs, the first two with their 95% intervals."""
    figure, axes = figure_of(10, 3.8, ncols=3)
    for i, summary in enumerate(summaries):
        steps = [c["step"] for c in summary["checkpoints"]]
        # Side by side, since runs that agree would hide each other's intervals.
        spread = 0.012 * max(steps) * (i - (len(summaries) - 1) / 2)
        for panel, key in zip(axes, NAMES.values(), strict=True):
            values = [c[key] for c in summary["checkpoints"]]
            style = {"color": PALETTE[i % 7], "marker": "o", "markersize": 4, "linewidth": 1.4}
            style["label"] = in_figure(summary["run"])
            edges = [c.get(f"{key}_interval") or [] for c in summary["checkpoints"]]
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
    first, last = summary["checkpoints"][0], summary["checkpoints"][-1]
    return f"from {first[key]:.2f} to {last[key]:.2f}"


def _message(summaries: Sequence[Summary]) -> str:
    """Whether BLEU moves by more than its intervals; and the loss."""
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
    """How wide BLEU's 95% interval is for fewer of these answers, and for how many more it would be 2 points wide.

    `answers` are those of one result. Each size is drawn `draws` times without putting back; sacreBLEU's bootstrap
    gives the width of each draw. The line falls with the root of the number, from the mean of all answers' width.
    """
    chance = random.Random(seed)  # noqa: S311 (draws answers, guards nothing)
    sizes = [n for n in (4, 8, 16, 32, 64, 128, 256) if n < len(answers)]
    tokenize = tokenizer_for([a["reference"] for a in answers])
    found: list[tuple[int, float]] = []
    for size in [*sizes, len(answers)]:
        for _ in range(draws if size < len(answers) else 1):
            part = chance.sample(list(answers), size)
            scores = corpus_scores([a["output"] for a in part], [a["reference"] for a in part], 300, tokenize)
            low, high = scores["bleu_interval"]
            found.append((size, high - low))
    all_of_them = found[-1][1]
    needed = round(len(answers) * (all_of_them / 2) ** 2)
    figure, axes = figure_of(7.6, 3.4)
    axes.plot(*zip(*found, strict=True), "o", color=PALETTE[0], alpha=0.6, label="drawn from the answers (measured)")
    line = [max(1, sizes[0] if sizes else 1), max(needed, len(answers))]
    roots = [all_of_them * (len(answers) / n) ** 0.5 for n in line]
    title = f"{len(answers)} answers leave BLEU open by {all_of_them:.0f} points; 2 points would need about {needed:,}"
    if all_of_them > 0:
        axes.plot(line, roots, color=PALETTE[1], linestyle="--", label="falling with the root of the number")
        axes.set(yscale="log")
    elif scores["bleu"]:
        title = f"BLEU is {scores['bleu']:.0f} whichever of these {len(answers)} answers are drawn"
    else:
        title = f"Not one of {len(answers)} answers shares enough to be scored: no run of words is in its reference"
    axes.set(xscale="log", xlabel="answers", ylabel="width of the 95% interval, BLEU", title=title)
    axes.legend(frameon=False)
    return picture_of(figure, f"Width of BLEU's 95% interval against the number of answers: {title}.")
