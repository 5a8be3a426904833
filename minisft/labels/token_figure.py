"""Draw the token lens as a figure: tiles of text, one per token."""

from __future__ import annotations

from collections.abc import Sequence

from minisft.drawing import Picture, drawable, figure_of, picture_of


def draw_tokens(
    tiles: Sequence[tuple[str, tuple[str, ...], list[float]]], title: str, legend: str, alt: str, width: float
) -> Picture:
    """Draw tiles (text, kinds, losses) in lines of `width` points.

    Losses are bars below their tile, in nats; `alt` is the alternative text.
    """
    from textwrap import wrap

    edges = {
        "target": ("#8a5a00", "-"),
        "control": ("#0072B2", "-"),
        "added word": ("#0072B2", "-"),
        "padding": ("#777777", "--"),
    }
    character, gap = 6.02, 13.0  # points: a character of DejaVu Sans Mono at 10 points; between tiles
    pitch = 42 if any(losses for _, _, losses in tiles) else 27  # points between lines
    heading = wrap(title, int(width / 7.2))
    placed, x, y = [], gap, 18 + 17 * len(heading)
    for text, kinds, losses in tiles:
        text = drawable(text)
        size = character * len(text)
        if x + size + gap > width and x > gap:
            x, y = gap, y + pitch
        placed.append((x, y, text, kinds, losses))
        x += size + gap
    height = y + pitch + 8
    figure, axes = figure_of(width / 72, height / 72)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    for x, y, text, kinds, losses in placed:
        trained, edge = "target" in kinds, edges.get(kinds[0], ("#999999", ":"))
        box = {"boxstyle": "round,pad=0.3", "facecolor": "#F5B22E" if trained else "#f1f3f5", "linewidth": 1}
        box |= {"edgecolor": edge[0], "linestyle": edge[1]}
        if "control" in kinds:
            box |= {"boxstyle": "round,pad=0.3,rounding_size=0.8", "linewidth": 2}
        if "cut off" in kinds:
            box |= {"boxstyle": "square,pad=0.3", "facecolor": "#a3171f", "edgecolor": "#ffffff", "linestyle": "--"}
        style = {"weight": "bold" if trained else "normal", "color": "white" if "cut off" in kinds else "black"}
        axes.text(x, y, text, bbox=box, family="DejaVu Sans Mono", fontsize=10, va="center", parse_math=False, **style)
        for n, loss in enumerate(losses):
            left = x + character * len(text) / 2 + 7 * (n - len(losses) / 2)
            axes.bar(left, -1.7 * loss, 5, y + 26, align="edge", color="#222222" if trained else "#bbbbbb")
    for n, text in enumerate(heading):
        axes.text(gap / 2, 16 + 17 * n, text, fontsize=11, fontweight="bold", va="center", parse_math=False)
    axes.text(gap / 2, height - 10, legend, fontsize=8.5, color="#444444", va="center", parse_math=False)
    return picture_of(figure, alt)
