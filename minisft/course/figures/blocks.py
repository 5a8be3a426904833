"""Figures of blocks: what each rank holds at each stage, and what the collectives do to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from minisft.course.figures.runs import OWNER_COLOURS
from minisft.drawing import Picture, figure_of, picture_of
from minisft.zero.state_memory import paper_formula

# Bytes per parameter in half precision, and the first stage that splits them; ZeRO paper, section 3.1.
STATES = {"parameters": (2, 3), "gradients": (2, 2), "fp32 masters": (4, 1), "optimizer states": (8, 1)}
OWN, SUMMED = "#D9E0E6", "#5B7083"  # ranks and what they send: slate, which no owner of bytes has
RANKS = 4


def stages_by_rank(parameters: float = 7e9, ranks: int = RANKS) -> Picture:
    """Draw which part of the model states each rank holds at each stage of ZeRO.

    One column per stage, one row per rank. Lengths are bytes, by the paper's formula; colored is
    what the rank holds, white what other ranks hold for it.
    """
    figure, panels = figure_of(9.6, 1.5 + 0.42 * ranks, ncols=4)
    held = [paper_formula(parameters, ranks, stage) / 1e9 for stage in range(4)]
    for stage, axes in enumerate(panels):
        for rank in range(ranks):
            _draw_states(axes, rank, ranks, stage)
        axes.set(xlim=(-0.1, 16.1), ylim=(ranks - 0.5, -0.5), xticks=[], yticks=[], title=f"stage {stage}")
        axes.set_xlabel(f"{held[stage]:.1f} GB on each rank")
        axes.spines[["left", "bottom"]].set_visible(False)
    panels[0].set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    panels[0].tick_params(length=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, fontsize=9, loc="outside lower center")
    figure.suptitle(f"Each stage splits more of the same states: {held[0]:.0f} GB on every rank become {held[3]:.0f}")
    each = "; ".join(f"stage {stage} {size:.1f} GB, {_split_at(stage)}" for stage, size in enumerate(held))
    return picture_of(
        figure, f"Model states of {parameters / 1e9:g} billion parameters on each of {ranks} ranks: {each}."
    )


def _split_at(stage: int) -> str:
    split = [owner for owner, (_, first) in STATES.items() if first <= stage]
    return f"{', '.join(split)} split" if split else "nothing split"


def _draw_states(axes: Any, rank: int, ranks: int, stage: int) -> None:
    """Draw the row of one rank: an outline per kind of state, filled where the rank holds it."""
    left = 0.0
    for owner, (size, first) in STATES.items():
        axes.barh(rank, size, left=left, height=0.66, color="white", edgecolor="#999999", linewidth=0.6)
        width, begin = (size / ranks, left + rank * size / ranks) if stage >= first else (size, left)
        label = owner if rank == 0 else None
        axes.barh(rank, width, left=begin, height=0.66, color=OWNER_COLOURS[owner], label=label)
        left += size


def collectives(ranks: int = RANKS) -> Picture:
    """Draw small arrays on several ranks before and after a reduce-scatter and an all-gather, which
    together are an all-reduce.

    The numbers come from applying the operations to arrays.
    """
    # The tens number the block, the ones the rank, so that every value shows where it comes from.
    before = np.array([[10 * (block + 1) + rank for block in range(ranks)] for rank in range(ranks)])
    scattered = reduce_scatter(before)
    gathered = all_gather(scattered)
    assert np.array_equal(gathered, all_reduce(before))
    blocks = [[scattered[rank] if column == rank else None for column in range(ranks)] for rank in range(ranks)]
    figure, axes = figure_of(9.6, 1.2 + 0.5 * ranks)
    step = ranks + 2.2  # from one picture of all ranks to the next, in blocks
    for number, rows in enumerate((before.tolist(), blocks, gathered.tolist())):
        for rank, row in enumerate(rows):
            _draw_row(axes, number * step, rank, row, bool(number))
    for number, name in enumerate(("reduce-scatter", "all-gather")):
        _arrow(axes, number * step + ranks + 0.15, (number + 1) * step - 0.15, ranks / 2, name)
    _arrow(axes, ranks / 2, 2 * step + ranks / 2, -0.75, "all-reduce: the same result")
    for number, name in enumerate(("each rank has its own values", "each has one block's sum", "all have all sums")):
        axes.text(number * step + ranks / 2, ranks + 0.45, name, ha="center", fontsize=9)
    axes.set(xlim=(-1.3, 2 * step + ranks + 0.1), ylim=(ranks + 0.7, -1.5), xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title("An all-reduce is a reduce-scatter followed by an all-gather")
    return picture_of(
        figure,
        f"{ranks} ranks with {ranks} blocks each. A reduce-scatter leaves rank 0 with the sum of block 0, "
        f"{scattered[0]}, and each other rank with that of its own block; an all-gather then gives every rank all "
        f"sums, {', '.join(map(str, gathered[0]))}. An all-reduce gives the same.",
    )


def reduce_scatter(arrays: np.ndarray) -> np.ndarray:
    """Return for each rank the sum over ranks of its own block; `arrays` is [ranks, blocks]."""
    return np.array([arrays[:, rank].sum() for rank in range(len(arrays))])


def all_gather(blocks: np.ndarray) -> np.ndarray:
    """Return for each rank the blocks of all ranks, [ranks, blocks]; `blocks` has one per rank."""
    return np.array([blocks for _ in blocks])


def all_reduce(arrays: np.ndarray) -> np.ndarray:
    """Return for each rank the sum over ranks of every block; `arrays` is [ranks, blocks]."""
    return np.array([arrays.sum(axis=0) for _ in arrays])


def _draw_row(axes: Any, left: float, rank: int, row: list[Any], summed: bool) -> None:
    """Draw the blocks of one rank; an empty outline stands for a block that it does not hold."""
    if left == 0:
        axes.text(-0.2, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=9)
    for column, value in enumerate(row):
        color = "white" if value is None else SUMMED if summed else OWN
        axes.barh(
            rank + 0.5, 0.94, left=left + column + 0.03, height=0.8, color=color, edgecolor="#999999", linewidth=0.6
        )
        if value is not None:
            text = {"color": "white" if summed else "black", "fontsize": 8, "ha": "center", "va": "center"}
            axes.text(left + column + 0.5, rank + 0.5, str(value), **text)


def _arrow(axes: Any, begin: float, end: float, height: float, name: str) -> None:
    axes.annotate("", (end, height), (begin, height), arrowprops={"arrowstyle": "->", "linewidth": 1.3})
    axes.text((begin + end) / 2, height - 0.15, name, ha="center", va="bottom", fontsize=9)
