"""The matplotlib figures. Each says its message in its title, and carries a text for those who cannot see it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from minisft.compare import model_states
from minisft.conversations import Conversation
from minisft.labels import IGNORE_INDEX, Row
from minisft.runs import Run
from minisft.tokens import Tokenizer

# Okabe and Ito (2008): distinguishable with every common kind of colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
OWNER_COLOURS = {
    "parameters": "#0072B2",
    "gradients": "#009E73",
    "fp32 masters": "#56B4E9",
    "optimizer states": "#E69F00",
    "other tensors": "#BBBBBB",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: PNG bytes and their alternative text."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": self.png, "text/plain": self.alt}, {"image/png": {"alt": escape(self.alt)}}

    def save(self, path: Path | str) -> None:
        Path(path).write_bytes(self.png)


def loss_curves(runs: Sequence[Run]) -> Picture:
    """Loss against steps, all runs on one axis, and below it how far each lies from the first run."""
    curves = {run.name: [m["loss"] for m in run.metrics] for run in runs}
    steps = min(map(len, curves.values()))
    first = next(iter(curves.values()))[:steps]
    away = {name: [abs(a - b) / b for a, b in zip(c, first, strict=False)] for name, c in curves.items()}
    worst = max(max(a) for a in away.values())
    verdict = "lie on each other" if worst < 1e-3 else "differ"
    figure, (top, bottom) = _figure(7.6, 5.0, nrows=2, sharex=True, height_ratios=[2.2, 1])
    # Widths shrink in drawing order, so that curves which coincide still all show.
    for i, (name, curve) in enumerate(curves.items()):
        width = 9 - 7.5 * i / max(1, len(curves) - 1)
        x = range(1, len(curve) + 1)
        top.plot(x, curve, color=PALETTE[i % 7], linewidth=width, label=name, solid_capstyle="round")
        if i:
            bottom.plot(x[:steps], [max(a, 1e-9) for a in away[name]], color=PALETTE[i % 7], marker="o", label=name)
    base = next(iter(curves))
    top.set(ylabel="loss (nats per trained token)", title=f"{len(runs)} strategies, one loss: the curves {verdict}")
    top.legend(frameon=False)
    bottom.axhline(1e-3, color="#888888", linestyle=":", linewidth=1)
    bottom.set(yscale="log", ylim=(3e-10, 1), xlabel="optimizer step", ylabel=f"relative distance\nfrom {base}")
    first_to_last = f"from {first[0]:.2f} to {first[-1]:.2f} in {steps} steps"
    return _picture(
        figure,
        f"Loss curves of {', '.join(curves)}: {base} goes {first_to_last}; "
        f"the largest relative distance of any other run from it is {worst:.1e}.",
    )


def memory_bars(runs: Sequence[Run]) -> Picture:
    """Measured bytes of one rank between two steps, by owner, one bar per run."""
    figure, axes = _figure(7.6, 0.9 + 0.55 * len(runs))
    names = [f"{run.name} ({run.config.ranks} rank{'s' if run.config.ranks > 1 else ''})" for run in runs]
    ranks = [max(run.memory, key=model_states) for run in runs]
    left = [0.0] * len(runs)
    for owner, colour in OWNER_COLOURS.items():
        sizes = [rank[owner] / 1e9 for rank in ranks]
        axes.barh(names, sizes, left=left, color=colour, label=owner, edgecolor="white")
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    least = min(left)
    lightest = " and ".join(run.name for run, total in zip(runs, left, strict=True) if total < 1.01 * least)
    title = f"{lightest} hold {least:.2f} GB on each rank, {runs[0].name} {left[0]:.2f} GB"
    axes.set(xlabel="GB on one rank between two steps (measured)", title=title)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    each = "; ".join(
        f"{run.name} {model_states(rank) / 1e9:.2f} GB of model states and {rank['other tensors'] / 1e9:.2f} GB else"
        for run, rank in zip(runs, ranks, strict=True)
    )
    return _picture(figure, f"Memory of one rank, measured: {each}.")


def before_and_after(summaries: Sequence[dict[str, Any]]) -> Picture:
    """Loss on the test answers, and the share of answers that stop, against steps; `summary.json` of several runs."""
    figure, (left, right) = _figure(8.2, 3.4, ncols=2)
    for i, summary in enumerate(summaries):
        steps = [c["step"] for c in summary["checkpoints"]]
        width = 7 - 5.5 * i / max(1, len(summaries) - 1)
        for axes, key, scale in ((left, "loss", 1), (right, "stopped", 100)):
            values = [scale * c[key] for c in summary["checkpoints"]]
            axes.plot(steps, values, marker="o", color=PALETTE[i % 7], linewidth=width, label=summary["run"])
    first, last = summaries[0]["checkpoints"][0], summaries[0]["checkpoints"][-1]
    moved = "falls" if last["loss"] < first["loss"] else "does not fall"
    change = 100 * (last["stopped"] - first["stopped"])
    left.set(xlabel="optimizer step", ylabel="loss on test answers", title=f"The test loss {moved}")
    learns = "The model learns to stop" if change > 0 else "Stopping is not learned"
    right.set(xlabel="optimizer step", ylabel="answers that stop by themselves, %", ylim=(-3, 103), title=learns)
    left.legend(frameon=False)
    return _picture(
        figure,
        f"Test loss of {summaries[0]['run']} from {first['loss']:.2f} to {last['loss']:.2f}; answers that stop by "
        f"themselves from {first['stopped']:.0%} to {last['stopped']:.0%}; "
        f"{len(summaries)} strategies drawn on the same axes.",
    )


def token_strip(conversation: Conversation, row: Row, tokenizer: Tokenizer, width: float = 660) -> Picture:
    """One encoded conversation as coloured tokens: what is read, and what is learned. `width` is in points."""
    character, gap = 6.02, 9.0  # of DejaVu Sans Mono at 10 points, and between two tokens
    placed, x, line = [], gap, 0
    for token_id, label in zip(row.input_ids, row.labels, strict=True):
        text = tokenizer.piece(token_id)
        if x + character * len(text) + gap > width and x > gap:
            x, line = gap, line + 1
        placed.append((x, line, text, label != IGNORE_INDEX))
        x += character * len(text) + gap
    height = 34 + 26 * (line + 1)
    figure, axes = _figure(width / 72, height / 72)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height))
    for x, line, text, trained in placed:
        box = {"boxstyle": "round,pad=0.25", "facecolor": "#E69F00" if trained else "#dde3ea", "edgecolor": "none"}
        style = {"family": "DejaVu Sans Mono", "fontsize": 10, "va": "center", "parse_math": False}
        axes.text(x, height - 46 - 26 * line, text, bbox=box, **style)
    title = f"{conversation_turns(conversation)} become {len(row.input_ids)} tokens; "
    title += f"the loss sees the {row.trained} in orange"
    axes.text(gap, height - 18, title, fontsize=11, fontweight="bold", va="center")
    alt = f"A conversation as {len(row.input_ids)} tokens; {row.trained} of them, the answers and EOS, are trained."
    return _picture(figure, alt)


def conversation_turns(conversation: Conversation) -> str:
    questions = sum(m.role == "user" for m in conversation.messages)
    return f"{questions} question{'s' if questions > 1 else ''} and answer{'s' if questions > 1 else ''}"


def _figure(width: float, height: float, **layout: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state would leak figures and follow whatever backend is set.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**layout)
    for one in axes.flat if hasattr(axes, "flat") else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.set_title("", loc="left")
    return figure, axes


def _picture(figure: Any, alt: str) -> Picture:
    for axes in figure.axes:
        title = axes.get_title() or axes.get_title(loc="left")
        axes.set_title("")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return Picture(out.getvalue(), alt)
