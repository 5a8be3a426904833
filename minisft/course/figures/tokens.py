"""Figures of tokens: chat templates compared, and the tokens that each data stage keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from minisft.chat.mistral import Segment
from minisft.chat.tokenizers import Tokenizer
from minisft.data.ledger import Ledger
from minisft.drawing import Picture, drawable, figure_of, picture_of
from minisft.labels.encode_row import encode_segments

TRAINED = "#E69F00"
LANE_COLOURS = {
    "system prompt": "#56B4E9",
    "question": "#dde3ea",
    "answer: trained": TRAINED,
    "answer: only read": "#fbe7c2",
    "framed: one control id": "#ffffff",
}
WHY_LESS = {
    "cleaned": "dropped in cleaning",
    "truncated": "did not fit in the row",
    "trained": "prompts: read, not trained",
}


def token_lanes(lanes: Mapping[str, tuple[Iterable[Segment], Tokenizer]], marked: str, title: str) -> Picture:
    """Draw several encodings below each other: colors show the speaker, frames the control ids.

    `lanes` maps a label to segments and the tokenizer that encodes them. Tokens of the text
    `marked` (for example the system prompt) have a separate color, to show where each encoding puts
    it. Each turn starts a new line.
    """
    from textwrap import wrap

    character, gap, left, width, pitch = 5.42, 8.0, 74.0, 640.0, 21.0  # points, for DejaVu Sans Mono at 9 points
    heading = wrap(title, 86)
    tiles: list[tuple[float, float, str, str, bool]] = []  # x, y from the top, text, kind, framed
    heads: list[tuple[float, str, int]] = []
    descriptions = []
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
        descriptions.append(
            f"{label}: {count} tokens, {trained} trained" + "".join(f", {marked!r} in {at}" for at in turns)
        )
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
    return picture_of(figure, f"{title}. Colored tokens; {'; '.join(descriptions)}.")


def _lane_kind(segment: Segment) -> str:
    if segment.role == "assistant":
        return "answer: trained" if segment.trained else "answer: only read"
    return {"template": "framed: one control id", "user": "question", "system": "system prompt"}[segment.role]


def _tile(kind: str, framed: bool) -> dict[str, Any]:
    edge = {"edgecolor": "#000000", "linewidth": 1.3} if framed else {"edgecolor": "none"}
    return {"boxstyle": "round,pad=0.28", "facecolor": LANE_COLOURS[kind], **edge}


def _tokens_of(text: str, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Mark which of `ids` overlap the first occurrence of `text`, compared as bytes."""
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    start = b"".join(pieces).find(text.encode()) if text else -1
    stop = start + len(text.encode())
    flags, at = [], 0
    for piece in pieces:
        flags.append(start >= 0 and at < stop and at + len(piece) > start)
        at += len(piece)
    return flags


def token_flow(ledger: Ledger) -> Picture:
    """Draw the rows and tokens left after each of the ledger's stages, and what each stage dropped."""
    stages = list(ledger.stages)
    tokens = [(ledger.tokens(stage) or 0) / 1e6 for stage in stages]
    rows = [ledger.stages[stage].rows for stage in stages]
    figure, axes = figure_of(8.2, 0.9 + 0.42 * len(stages))
    axes.barh(stages, tokens, color=[TRAINED if stage == "trained" else "#5b6770" for stage in stages], height=0.62)
    full = max(tokens) or 1.0
    for i, (before, now) in enumerate(zip([tokens[0], *tokens], tokens, strict=False)):
        inside = now > 0.2 * full
        text_style = {"ha": "right" if inside else "left", "color": "white" if inside else "black"}
        if stages[i] == "trained":
            text_style["color"] = "black"
        axes.text(now - 0.01 * full if inside else now, i, f"{now:.1f} M", va="center", fontweight="bold", **text_style)
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
    token_share, row_share = tokens[-1] / full, rows[-1] / max(rows[0], 1)
    title = f"{row_share:.0%} of the rows are trained on, but only {token_share:.0%} of the tokens"
    axes.set_title(title)
    counts = "; ".join(f"{s} {r:,} rows, {t:.1f} million tokens" for s, r, t in zip(stages, rows, tokens, strict=True))
    return picture_of(figure, f"{title}: {counts}.")
