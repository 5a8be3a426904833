"""The matplotlib figures. Each says its message in its title, and carries a text for those who cannot see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minisft.chat.mistral import Segment
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation
from minisft.data.ledger import Ledger
from minisft.drawing import PALETTE, Picture, drawable, figure_of, in_figure, legend_below, picture_of
from minisft.labels.encode_row import Row, encode_segments
from minisft.launch.compare_runs import leanest, listed, model_states, summary_rows
from minisft.run.folder import Run
from minisft.zero.measured_memory import OTHER

OWNER_COLOURS = {
    "parameters": "#0072B2",
    "gradients": "#009E73",
    "fp32 masters": "#56B4E9",
    "optimizer states": "#E69F00",
    "buckets": "#CC79A7",
    "persistent parameters": "#D55E00",
    "offload buffers": "#F0E442",
    OTHER: "#BBBBBB",
}


def loss_curves(runs: Sequence[Run]) -> Picture:
    """Loss against steps, all runs on one axis, and below it how far each lies from the first run."""
    curves = {run.name: [m["loss"] for m in run.metrics] for run in runs}
    steps = min(map(len, curves.values()))
    first = next(iter(curves.values()))[:steps]
    away = {n: [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(c, first, strict=False)] for n, c in curves.items()}
    worst = max(max(a) for a in away.values())
    verdict = "lie on each other" if worst < 1e-3 else "differ"
    figure, (top, bottom) = figure_of(7.6, 5.0, nrows=2, sharex=True, height_ratios=[2.2, 1])
    # Widths shrink in drawing order, so that curves which coincide still all show.
    for i, (name, curve) in enumerate(curves.items()):
        width = 9 - 7.5 * i / max(1, len(curves) - 1)
        x = range(1, len(curve) + 1)
        top.plot(x, curve, color=PALETTE[i % 7], linewidth=width, label=in_figure(name), solid_capstyle="round")
        if i:
            bottom.plot(x[:steps], [max(a, 1e-9) for a in away[name]], color=PALETTE[i % 7], marker="o")
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
    """Runs side by side: loss against steps and against time, tokens per second, memory and communication per rank."""
    rows = {row["run"]: row for row in summary_rows(runs)}
    colours = {run.name: PALETTE[i % 7] for i, run in enumerate(runs)}
    figure, axes = figure_of(10, 6, nrows=2, ncols=3)
    (by_step, by_time, speeds), (states, peaks, traffic) = axes
    for i, run in enumerate(runs):
        losses = [m["loss"] for m in run.metrics]
        seconds = [sum(m["seconds"] for m in run.metrics[: n + 1]) for n in range(len(losses))]
        width = 7 - 5.5 * i / max(1, len(runs) - 1)
        style = {"color": colours[run.name], "linewidth": width, "label": in_figure(run.name)}
        by_step.plot([m["step"] for m in run.metrics], losses, **style)
        by_time.plot(seconds, losses, color=colours[run.name], linewidth=1.8)
    by_step.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    by_time.set(xlabel="seconds of training", ylabel="loss")
    panels = (
        (speeds, "tokens_per_second", 1, "tokens/s"),
        (states, "model_state_bytes", 1e9, "GB of states per rank"),
        (peaks, "peak_bytes", 1e9, "GB per rank at its peak"),
        (traffic, "sent_bytes", 1e9, "GB sent per rank and step"),
    )
    for panel, key, size, label in panels:
        values = [(row[key] or 0) / size for row in rows.values()]
        panel.barh(list(map(in_figure, rows)), values, color=list(colours.values()))
        panel.set(xlabel=label, xlim=(0, 1.25 * max(*values, 1e-9)))
        panel.invert_yaxis()
        panel.tick_params(axis="y", labelsize=8)
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:,.0f}" if size == 1 else f" {value:.2f}", va="center", fontsize=8)
    legend_below(figure, by_step)
    fastest = max(rows, key=lambda name: rows[name]["tokens_per_second"] or 0)
    lightest = leanest(list(rows.values()))
    least = f", and {listed(list(map(in_figure, lightest)))} held the least between steps" if lightest else ""
    figure.suptitle(f"On this machine {in_figure(fastest)} was the fastest{least}")
    each = "; ".join(
        f"{name} {row['tokens_per_second'] or 0:,.0f} tokens/s, {_gigabytes(row['model_state_bytes'])} of states, "
        f"{_gigabytes(row['peak_bytes'])} at the peak, {_gigabytes(row['sent_bytes'])} sent per step"
        for name, row in rows.items()
    )
    return picture_of(figure, f"Runs side by side: {each}.")


def _gigabytes(size: float | None) -> str:
    return f"{(size or 0) / 1e9:.2f} GB"


def memory_bars(runs: Sequence[Run]) -> Picture:
    """Measured bytes of one rank between two steps, by owner, one bar per run."""
    figure, axes = figure_of(7.6, 0.9 + 0.55 * len(runs))
    drawn = [in_figure(run.name) for run in runs]
    names = [f"{name} ({r.config.ranks} rank{'s' * (r.config.ranks > 1)})" for name, r in zip(drawn, runs, strict=True)]
    ranks = [max(run.memory, key=model_states, default={}) for run in runs]
    left = [0.0] * len(runs)
    for owner, colour in OWNER_COLOURS.items():
        sizes = [rank.get("at rest", {}).get(owner, 0) / 1e9 for rank in ranks]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=owner, edgecolor="white")
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    least = min(left)
    lightest = " and ".join(name for name, total in zip(drawn, left, strict=True) if total < 1.01 * least)
    title = f"{lightest} hold {least:.2f} GB on each rank, {drawn[0]} {left[0]:.2f} GB"
    axes.set(xlabel="GB on one rank between two steps (measured)", title=title)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    others = [rank.get("at rest", {}).get(OTHER, 0) for rank in ranks]
    each = "; ".join(
        f"{run.name} {model_states(rank) / 1e9:.2f} GB of model states and {other / 1e9:.2f} GB else"
        for run, rank, other in zip(runs, ranks, others, strict=True)
    )
    return picture_of(figure, f"Memory of one rank, measured: {each}.")


def before_and_after(summaries: Sequence[dict[str, Any]]) -> Picture:
    """Loss on the test answers, and the share of answers that stop, against steps; `summary.json` of several runs."""
    figure, (left, right) = figure_of(8.2, 3.4, ncols=2)
    for i, summary in enumerate(summaries):
        steps = [c["step"] for c in summary["checkpoints"]]
        width = 7 - 5.5 * i / max(1, len(summaries) - 1)
        for axes, key, scale in ((left, "loss", 1), (right, "stopped", 100)):
            values = [scale * c[key] for c in summary["checkpoints"]]
            style = {"color": PALETTE[i % 7], "linewidth": width, "label": in_figure(summary["run"])}
            axes.plot(steps, values, marker="o", **style)
    first, last = summaries[0]["checkpoints"][0], summaries[0]["checkpoints"][-1]
    moved = "falls" if last["loss"] < first["loss"] else "does not fall"
    change = 100 * (last["stopped"] - first["stopped"])
    left.set(xlabel="optimizer step", ylabel="loss on test answers", title=f"The test loss {moved}")
    learns = "The model learns to stop" if change > 0 else "Stopping is not learned"
    right.set(xlabel="optimizer step", ylabel="answers that stop by themselves, %", ylim=(-3, 103), title=learns)
    left.legend(frameon=False)
    return picture_of(
        figure,
        f"Test loss of {summaries[0]['run']} from {first['loss']:.2f} to {last['loss']:.2f}; answers that stop by "
        f"themselves from {first['stopped']:.0%} to {last['stopped']:.0%}; "
        f"{len(summaries)} strategies drawn on the same axes.",
    )


def token_strip(conversation: Conversation, row: Row, tokenizer: Tokenizer, width: float = 660) -> Picture:
    """One encoded conversation as coloured tokens: what is read, and what is learned. `width` is in points."""
    from minisft.labels.token_lens import Lens

    title = f"{conversation_turns(conversation)} become {len(row.input_ids)} tokens; "
    return Lens(row, tokenizer).figure(title + f"the loss sees the {row.trained} in orange", width)


def draw_tokens(
    tiles: Sequence[tuple[str, tuple[str, ...], list[float]]], title: str, legend: str, alt: str, width: float
) -> Picture:
    """Tiles of text, with the kinds and the losses of the token lens, in lines of `width` points."""
    from textwrap import wrap

    edges = {"target": ("#8a5a00", "-"), "control": ("#0072B2", "-"), "padding": ("#777777", "--")}
    character, gap = 6.02, 13.0  # points; of DejaVu Sans Mono at 10 points, and between two tiles
    pitch = 42 if any(losses for _, _, losses in tiles) else 27
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


LANE_COLOURS = {
    "system prompt": "#56B4E9",
    "question": "#dde3ea",
    "answer: trained": "#E69F00",
    "answer: only read": "#fbe7c2",
    "framed: one control id": "#ffffff",
}


def token_lanes(lanes: Mapping[str, tuple[Iterable[Segment], Tokenizer]], marked: str, title: str) -> Picture:
    """Several encodings below each other: who speaks by colour, control ids framed, one line per turn.

    `lanes` maps a label to segments and the tokenizer that encodes them. The tokens of the text `marked`, the system
    prompt for one, have a colour of their own, so that one sees where each encoding puts it.
    """
    from textwrap import wrap

    character, gap, left, width, pitch = 5.42, 8.0, 74.0, 640.0, 21.0  # points; of DejaVu Sans Mono at 9 points
    heading = wrap(title, 86)
    tiles: list[tuple[float, float, str, str, bool]] = []  # x, y from the top, text, kind, framed
    heads: list[tuple[float, str, int]] = []
    told = []
    y = 30.0 + 16 * len(heading)
    for label, (segments, tokenizer) in lanes.items():
        x, top, turn, count, trained, turns = left, y, 0, 0, 0, []
        for segment in segments:
            if segment.turn != turn:
                x, y, turn = left, y + pitch, segment.turn
            ids = encode_segments([segment], tokenizer)
            count, trained = count + len(ids), trained + len(ids) * segment.trained
            flags = _tokens_of(marked, ids, tokenizer) if segment.text else [False] * len(ids)
            turns += [f"turn {turn + 1}"] * any(flags)
            for token_id, flag in zip(ids, flags, strict=True):
                text = drawable(tokenizer.piece(token_id))
                if x + character * len(text) > width and x > left:
                    x, y = left, y + pitch
                kind = "system prompt" if flag else _lane_kind(segment)
                tiles.append((x, y, text, kind, segment.control is not None))
                x += character * len(text) + gap
        heads.append((top, label, count))
        told.append(f"{label}: {count} tokens, {trained} trained" + "".join(f", {marked!r} in {at}" for at in turns))
        y = max(y + pitch, top + 1.5 * pitch) + 12
    figure, axes = figure_of(width / 72, (y + 16) / 72)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(y + 16, 0))
    for n, text in enumerate(heading):
        axes.text(6, 18 + 16 * n, text, fontsize=11, fontweight="bold", va="center", parse_math=False)
    for at, label, count in heads:
        axes.text(6, at, label, fontsize=10, fontweight="bold", va="center", parse_math=False)
        axes.text(6, at + 14, f"{count} tokens", fontsize=8, color="#444444", va="center")
    style = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center", "parse_math": False}
    for x, at, text, kind, framed in tiles:
        axes.text(x, at, text, bbox=_tile(kind, framed), **style)
    x = left
    for kind in LANE_COLOURS:
        if any(kind == tile[3] for tile in tiles):
            axes.text(x, y + 2, kind, bbox=_tile(kind, kind.startswith("framed")), va="center", fontsize=8.5)
            x += 4.7 * len(kind) + 24
    return picture_of(figure, f"{title}. Coloured tokens; {'; '.join(told)}.")


def _lane_kind(segment: Segment) -> str:
    if segment.role == "assistant":
        return "answer: trained" if segment.trained else "answer: only read"
    return {"template": "framed: one control id", "user": "question", "system": "system prompt"}[segment.role]


def _tile(kind: str, framed: bool) -> dict[str, Any]:
    edge = {"edgecolor": "#000000", "linewidth": 1.3} if framed else {"edgecolor": "none"}
    return {"boxstyle": "round,pad=0.28", "facecolor": LANE_COLOURS[kind], **edge}


def _tokens_of(text: str, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Which of `ids` hold a part of `text`, at its first place."""
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    start = b"".join(pieces).find(text.encode()) if text else -1
    stop = start + len(text.encode())
    flags, at = [], 0
    for piece in pieces:
        flags.append(start >= 0 and at < stop and at + len(piece) > start)
        at += len(piece)
    return flags


WHY_LESS = {
    "cleaned": "left out in cleaning",
    "truncated": "did not fit the row",
    "trained": "prompts: read, not learned",
}


def token_flow(ledger: Ledger) -> Picture:
    """Rows and tokens through the ledger's stages, and what each stage left out."""
    stages = list(ledger.stages)
    tokens = [(ledger.tokens(stage) or 0) / 1e6 for stage in stages]
    rows = [ledger.stages[stage].rows for stage in stages]
    figure, axes = figure_of(8.2, 0.9 + 0.42 * len(stages))
    axes.barh(stages, tokens, color="#0072B2", height=0.62)
    full = max(tokens) or 1.0
    for i, (before, now) in enumerate(zip([tokens[0], *tokens], tokens, strict=False)):
        inside = now > 0.2 * full
        colour = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": "black"}
        axes.text(now - 0.01 * full if inside else now, i, f"{now:.1f} M", va="center", fontweight="bold", **colour)
        if before - now > 0.005 * full:
            style = {"color": "#dde3ea", "edgecolor": "#8a94a0", "hatch": "////", "linewidth": 0.5}
            axes.barh(i, before - now, left=now, height=0.62, **style)
            why = f"− {before - now:.1f} M  {WHY_LESS.get(stages[i], '')}"
            axes.text(before + 0.012 * full, i, why, va="center", fontsize=9)
        axes.text(1.62 * full, i, f"{rows[i]:,}", ha="right", va="center")
    axes.text(1.62 * full, -0.75, "rows", ha="right", va="center", fontweight="bold")
    axes.set(xlim=(0, 1.62 * full), xlabel="million tokens")
    axes.set_xticks([t for t in axes.get_xticks() if t <= full])
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    share, kept = tokens[-1] / full, rows[-1] / max(rows[0], 1)
    title = f"{kept:.0%} of the rows are trained on, but only {share:.0%} of the tokens"
    axes.set_title(title)
    told = "; ".join(f"{s} {r:,} rows, {t:.1f} million tokens" for s, r, t in zip(stages, rows, tokens, strict=True))
    return picture_of(figure, f"{title}: {told}.")


def conversation_turns(conversation: Conversation) -> str:
    questions = sum(m.role == "user" for m in conversation.messages)
    return f"{questions} question{'s' if questions > 1 else ''} and answer{'s' if questions > 1 else ''}"
