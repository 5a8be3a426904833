"""The figure of a plan: what each strategy needs of a GPU, and what the ranks send."""

from __future__ import annotations

from typing import Any

from minisft.drawing import Picture, figure_of, picture_of
from minisft.text import unit_for
from minisft.zero.planner import RESERVED, Option, Plan


def plan_bars(found: Plan, gpu_bytes: float) -> Picture:
    """Draw what each strategy of a plan needs of a GPU, and what each rank sends; mark the best.

    `gpu_bytes` is the GPU's memory in bytes; the dashed line is that less `RESERVED`.
    """
    figure, (axes, sends) = figure_of(9.4, 1.0 + 0.45 * len(found.options), ncols=2, width_ratios=(5, 2), sharey=True)
    size, unit = unit_for(gpu_bytes)
    chosen = found.best.strategy if found.best else None
    edge = 2 * gpu_bytes / size  # longer bars (over two GPUs) are cut there and marked with a gap
    shown = [min(option.total / size, edge) for option in found.options]
    widest = max(*shown, edge / 2)
    axes.axvline((gpu_bytes - RESERVED) / size, color="black", linestyle="--", linewidth=1, zorder=1.5)
    for i, (option, end) in enumerate(zip(found.options, shown, strict=True)):
        style = _style(option, chosen)
        axes.barh(i, end, **style)
        if option.total / size > edge:
            axes.barh(i, widest / 120, left=edge * 0.95, color="white")
        verdict = f"{option.left / size:,.1f} {unit} left" if option.fits else "does not fit"
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        text = f"{option.total / size:,.1f} {unit}: {verdict}"
        axes.text(end + widest / 60, i, text, va="center", fontsize=8, bbox=background)
        sends.barh(i, option.sent / size, **style)
        sends.text(
            option.sent / size, i, f" {option.sent / size:,.1f}" if option.sent else " 0", va="center", fontsize=8
        )
    dashed = f"{unit} of one GPU (dashed: usable)"
    if any(option.total / size > edge for option in found.options):
        dashed += f"; bars with a gap are longer than {edge:,.0f} {unit}"
    axes.set(xlim=(0, 1.5 * widest), xlabel=dashed, title=_title(found))
    sends.set(
        xlim=(0, 1.3 * max(o.sent for o in found.options) / size or 1), xlabel=f"{unit} sent by each rank per step"
    )
    axes.set_yticks(range(len(found.options)), [option.strategy for option in found.options])
    axes.invert_yaxis()
    each = "; ".join(
        f"{o.strategy} {o.total / size:,.1f} {unit}{'' if o.fits else ', too much'}, sends {o.sent / size:,.1f} {unit}"
        for o in found.options
    )
    return picture_of(figure, f"Memory that each strategy needs of a GPU of {gpu_bytes / size:,.0f} {unit}: {each}.")


def _style(option: Option, chosen: str | None) -> dict[str, Any]:
    """Black is the chosen strategy, gray one that fits as well, and hatched one that does not fit."""
    if not option.fits:
        return {"color": "white", "edgecolor": "#888888", "hatch": "///"}
    return {"color": "black" if option.strategy == chosen else "#888888", "edgecolor": "white"}


def _title(found: Plan) -> str:
    if found.best is None:
        return "Nothing fits"
    less = any(option.fits and option.sent < found.best.sent for option in found.options)
    return f"{found.best.strategy} sends the least of those that fit{' without offloading' if less else ''}"
