"""Figures of labels: batches, what truncation keeps, rows affected by each bug, and loss per token.

The colors are those of the token lens where they show the same: orange for trained tokens, gray for
tokens that are only read, dark red for what was cut off, hatched for padding, blue frames for
control tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from minisft.chat.tokenizers import Tokenizer
from minisft.drawing import PALETTE, Picture, drawable, figure_of, picture_of
from minisft.labels.encode_row import IGNORE_INDEX, Row
from minisft.labels.token_lens_html import count_of
from minisft.training.batch_sampler import Packs

TRAINED, READ, CUT = "#F5B22E", "#c9ced4", "#a3171f"  # as in the token lens, the gray darker for bars
PADDING = {"facecolor": "#ffffff", "edgecolor": "#8a94a0", "hatch": "/////", "linewidth": 0.6}
COMMON, RARE = PALETTE[0], PALETTE[3]


def batch_layouts(rows: Sequence[Row], max_length: int) -> Picture:
    """Draw the same batch padded to its longest row, packed to `max_length` and without padding.

    One unit of length is one position that the model computes. A pack holds rows of at most
    `max_length` tokens together (`minisft.training.batch_sampler.Packs`).
    """
    packs = Packs(rows, [len(row.input_ids) for row in rows], max_length)
    used = sum(len(row.input_ids) for row in rows)
    layouts = {
        "padded": ([[row] for row in rows], max(len(row.input_ids) for row in rows)),
        "packed": ([packs[i] for i in range(len(packs))], max_length),
        "padding-free": ([list(rows)], used),
    }
    positions = {name: len(lines) * width for name, (lines, width) in layouts.items()}
    figure, axes = figure_of(8.2, 1.4 + 0.2 * sum(len(lines) + 1 for lines, _ in layouts.values()))
    top, ticks = 0.0, []
    for name, (lines, width) in layouts.items():
        ticks.append((top + (len(lines) - 1) / 2, f"{name}\n{positions[name]:,} positions"))
        for line in lines:
            _draw_line(axes, line, width, top)
            top += 1
        top += 1
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
    for kind, style in (("trained", {"color": TRAINED}), ("only read", {"color": READ}), ("padding", PADDING)):
        axes.bar(0, 0, label=kind, **style)
    axes.legend(frameon=False, loc="upper right")
    waste = {name: 100 * (1 - used / count) for name, count in positions.items()}
    each = ", ".join(f"{name} {share:.0f} %" for name, share in waste.items())
    title = f"Positions wasted on padding: {each}"
    axes.set(xlabel="positions in a row of the batch", xlim=(0, 1.01 * used), title=title)
    counts = "; ".join(
        f"{name}: {count_of(len(lines), 'row')} of {width:,} positions, {waste[name]:.0f} % of them padding"
        for name, (lines, width) in layouts.items()
    )
    return picture_of(figure, f"{len(rows)} conversations with {used:,} tokens in one batch. {counts}.")


def _draw_line(axes: Any, rows: Sequence[Row], width: int, y: float) -> None:
    """Draw one row of a batch at height `y`: conversations one after the other, then padding."""
    start = 0
    for row in rows:
        for color, left, length in _runs(row):
            axes.barh(y, length, left=start + left, height=0.72, color=color)
        start += len(row.input_ids)
        axes.plot([start] * 2, [y - 0.36, y + 0.36], color="black", linewidth=1.2)
    if start < width:
        axes.barh(y, width - start, left=start, height=0.72, **PADDING)


def _runs(row: Row) -> Iterator[tuple[str, int, int]]:
    """Yield (color, start, length) of each run of tokens that are trained, or only read."""
    start = 0
    for is_read, run in groupby(label == IGNORE_INDEX for label in row.labels):
        length = len(list(run))
        yield READ if is_read else TRAINED, start, length
        start += length


def truncation_bars(kept: Mapping[str, Sequence[Row]], whole: Sequence[Row], eos_id: int) -> Picture:
    """Draw the share of trained tokens each truncation mode keeps, split into complete and cut
    answers.

    `kept` maps a mode's name to the rows it leaves; `whole` are the rows without truncation.
    """
    everything = sum(row.trained for row in whole)
    counts = {name: _whole_and_cut(rows, eos_id) for name, rows in kept.items()}
    figure, axes = figure_of(7.6, 1.5 + 0.5 * len(counts))
    names = [f"{name} ({len(kept[name])} rows)" for name in counts]
    ended = [100 * complete / everything for complete, _ in counts.values()]
    cut_off = [100 * cut / everything for _, cut in counts.values()]
    axes.barh(names, ended, color=TRAINED, label="trained, in answers that end in EOS")
    axes.barh(names, cut_off, left=ended, color=CUT, label="trained, in answers cut off")
    for y, (a, b) in enumerate(zip(ended, cut_off, strict=True)):
        axes.text(a + b + 0.8, y, f"{a + b:.0f} %", va="center")
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.38))
    most = max(counts, key=lambda name: sum(counts[name]))
    cut = 100 * counts[most][1] / max(1, sum(counts[most]))
    share = 100 * sum(counts[most]) / everything
    title = f"'{most}' keeps {share:.0f} % of the targets, {cut:.0f} % of that without its end"
    axes.set(xlabel="% of the trained tokens of all rows", xlim=(0, 100), title=title)
    each = "; ".join(
        f"{name} leaves {len(kept[name])} rows, with {a:.0f} % in whole answers and {b:.0f} % in answers cut off"
        for name, a, b in zip(counts, ended, cut_off, strict=True)
    )
    return picture_of(figure, f"Of the trained tokens of {len(whole)} rows: {each}.")


def _whole_and_cut(rows: Sequence[Row], eos_id: int) -> tuple[int, int]:
    """Count the trained tokens up to each row's last trained EOS, and those after it."""
    complete = total = 0
    for row in rows:
        last = max((i for i, label in enumerate(row.labels) if label == eos_id), default=-1)
        complete += sum(label != IGNORE_INDEX for label in row.labels[: last + 1])
        total += row.trained
    return complete, total - complete


def bugs_on_rows(struck: Mapping[str, int], rows: int) -> Picture:
    """Draw in how many of `rows` real rows each bug violates an invariant, the rarest last.

    `struck` maps a bug's name to its number of rows.
    """
    order = sorted(struck, key=struck.__getitem__, reverse=True)
    shares = [100 * struck[name] / rows for name in order]
    rare = [name for name in order if struck[name] < rows / 2]
    figure, axes = figure_of(7.6, 0.9 + 0.34 * len(order))
    axes.barh(order, shares, color=[RARE if name in rare else COMMON for name in order])
    for y, name in enumerate(order):
        axes.text(shares[y] + 1, y, f"{struck[name]} of {rows}", va="center")
    axes.invert_yaxis()
    title = f"{len(order) - len(rare)} bugs in {len(order)} strike most rows, {len(rare)} hide in few or none"
    axes.set(xlabel="% of real rows that violate an invariant", xlim=(0, 118), title=title)
    axes.set_xticks(range(0, 101, 20))
    each = ", ".join(f"{name} in {struck[name]}" for name in order)
    return picture_of(figure, f"Of {rows} real rows, the number that violate an invariant: {each}.")


def losses_before_and_after(
    row: Row, tokenizer: Tokenizer, before: Sequence[float | None], after: Sequence[float | None]
) -> Picture:
    """Draw the loss of each trained token of a row under two models.

    `before` and `after` hold one loss per token of the row, in nats; None where there is none.
    """
    positions = [i for i, label in enumerate(row.labels) if i and label != IGNORE_INDEX]
    x = range(len(positions))
    figure, axes = figure_of(8.2, 3.7)
    for losses, shift, color, name in ((before, -0.2, "#99d8c6", "before training"), (after, 0.2, PALETTE[2], "after")):
        axes.bar([i + shift for i in x], [losses[p] for p in positions], width=0.4, color=color, label=name)
    ends = [n for n, p in enumerate(positions) if row.input_ids[p] == tokenizer.eos_id]
    for n in ends:
        axes.axvspan(n - 0.5, n + 0.5, color="#0072B2", alpha=0.12, linewidth=0, zorder=0)
    names = [drawable(tokenizer.piece(row.input_ids[p])) for p in positions]
    axes.set_xticks(list(x), ["EOS" if n in ends else name for n, name in enumerate(names)], rotation=60, ha="right")
    for label in axes.get_xticklabels():
        label.set(parse_math=False, rotation_mode="anchor", family="DejaVu Sans Mono", fontsize=9)
    means = [_mean(losses, positions) for losses in (before, after)]
    title = f"A trained token costs {means[1]:.2f} nats instead of {means[0]:.2f}"
    if ends:
        stops = [_mean(losses, [positions[n] for n in ends]) for losses in (before, after)]
        title += f", an EOS {stops[1]:.2f} instead of {stops[0]:.2f}"
    axes.set(ylabel="loss (nats)", title=title)
    axes.margins(x=0.01)
    axes.legend(frameon=False, ncols=2)
    each = "; ".join(
        f"{'EOS' if n in ends else name} {before[p]:.2f} and {after[p]:.2f}"
        for n, (name, p) in enumerate(zip(names, positions, strict=True))
    )
    return picture_of(figure, f"Loss of each trained token before and after training, in nats: {each}.")


def _mean(losses: Sequence[float | None], positions: Sequence[int]) -> float:
    known = [loss for p in positions if (loss := losses[p]) is not None]
    return sum(known) / len(known)
