"""Shared by all figures: colors, names that are drawn literally, and pictures with alternative text.

matplotlib reads `$…$` as a formula, hides a label that begins with an underscore, and draws a box for a character that
its font lacks. Run folders and data may have any name, so names go through `in_figure`, and other text is drawn with
`parse_math=False`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.files import written_whole
from minisft.text import harmless, one_line, spelt

# Okabe and Ito (2008): distinguishable with every common kind of color vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
LONGEST_NAME = 24  # characters of a name that a figure shows


@dataclass(frozen=True)
class Picture:
    """A drawn figure: PNG bytes and their alternative text."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": self.png, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}

    def save(self, path: Path | str) -> None:
        with written_whole(Path(path)) as stream:
            stream.buffer.write(self.png)


def figure_of(width: float, height: float, **layout: Any) -> Any:
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


def picture_of(figure: Any, alt: str) -> Picture:
    from PIL import Image

    for axes in figure.axes:
        title = axes.get_title() or axes.get_title(loc="left")
        axes.set_title("")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    # A palette looks the same at a third of the size, which matters for notebooks under version control.
    few_colors = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few_colors.save(out, "PNG", optimize=True, dpi=(110, 110))
    return Picture(out.getvalue(), harmless(alt))


def legend_below(figure: Any, axes: Any) -> None:
    """Add a legend for `axes` below the whole figure, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 100 // (6 + max(map(len, labels), default=0))))
    figure.legend(handles, labels, frameon=False, ncols=columns, loc="outside lower center")


def stacked_bars(
    axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]], colors: Mapping[str, str]
) -> list[float]:
    """Draw a horizontal bar per name, from the top, stacked of its entry in each of `parts`; return the bars' ends."""
    ends = [0.0] * len(names)
    for part, sizes in parts.items():
        if any(sizes):
            axes.barh(names, sizes, left=ends, color=colors[part], label=part, edgecolor="white")
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.invert_yaxis()
    return ends


def mark_measured(axes: Any, values: Iterable[tuple[int, float]]) -> None:
    """Draw a tick across the bar of each (row, value)."""
    label: str | None = "measured"
    for row, value in values:
        axes.plot([value] * 2, [row - 0.46, row + 0.46], color="black", linewidth=2, label=label)
        label = None


def run_style(i: int, count: int) -> dict[str, Any]:
    """Color and width of the curve of run `i` of `count`: later ones are thinner, so that equal curves all show."""
    return {"color": PALETTE[i % 7], "linewidth": 7 - 5.5 * i / max(1, count - 1)}


def in_figure(name: object) -> str:
    """A name as matplotlib draws it in a title, a legend or beside an axis: on one line and literally.

    Escapes `$`, which would begin a formula, and masks a leading underscore, which would hide the name in a legend.
    """
    line = drawable(one_line(name, LONGEST_NAME) or "∅", "DejaVu Sans:bold")
    line = (line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…").replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{line}" if line.startswith("_") else line


def drawable(text: str, face: str = "DejaVu Sans Mono:bold") -> str:
    """`text` with the characters spelled out that the font cannot draw, or would draw over their neighbors."""
    from unicodedata import bidirectional, combining

    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(face))
    can_draw = (font.get_char_index(ord(c)) and not combining(c) and bidirectional(c) not in ("R", "AL") for c in text)
    return "".join(c if drawn else spelt(c) for c, drawn in zip(text, can_draw, strict=True)).replace("◌\\", "\\")
