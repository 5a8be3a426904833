"""Marks, colors and HTML boxes of the token lens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

FOLD, KEPT = 400, 200  # of more than FOLD boxes or lines, all but KEPT at each end are folded
LONGEST = 2000  # of more than LONGEST table rows or folded boxes, all but KEPT at each end are omitted
MOST_LOSS = 8.0  # nats: the height of the highest bar


@dataclass(frozen=True)
class Kind:
    """How a kind of token is drawn: a mark and shape for any page color and without color."""

    mark: str
    meaning: str
    style: str


KINDS = {
    "prompt": Kind("", "only read", "border-bottom:2px dotted #888;background:rgba(128,128,128,.15)"),
    "target": Kind("●", "trained", "border-bottom:3px solid #8a5a00;background:#f5b22e;color:#000;font-weight:bold"),
    "control": Kind("◆", "structure, not text", "border:3px double #2b87c8;border-radius:9px"),
    "added word": Kind("◇", "one token that the vocabulary was extended by", "border:1px solid #2b87c8"),
    "padding": Kind("×", "not attended to", "border:1px dashed #888;font-style:italic"),
    "cut off": Kind("✂", "the row did not fit", "border:2px dashed #fff;background:#a3171f;color:#fff"),
    "folded": Kind("…", "", ""),
}


def folded(items: Sequence[Any], limit: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Split `items` into head, middle and tail; the middle is empty up to `limit` items."""
    if len(items) <= limit:
        return items, items[:0], items[:0]
    return items[:KEPT], items[KEPT:-KEPT], items[-KEPT:]


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun, for example `1 token` or `1,204 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def marks_of(kinds: Iterable[str]) -> str:
    """Return the marks of several kinds, concatenated."""
    return "".join(KINDS[kind].mark for kind in kinds)


def box_html(kinds: tuple[str, ...], text: str, title: str = "", below: str = "", align: str = "baseline") -> str:
    """Return one box as HTML; `bdi` isolates its text's direction even without styles."""
    style = ";".join(KINDS[kind].style for kind in reversed(kinds))
    mark = f"<small>{marks_of(kinds)}</small>&nbsp;" if marks_of(kinds) else ""
    title = f' title="{escape(title)}"' if title else ""
    return (
        f'<bdi dir="ltr"{title} style="display:inline-block;vertical-align:{align};padding:0 4px;'
        f'margin:2px 1px;border-radius:3px;{style}">{mark}{escape(text)}{below}</bdi>'
    )


def bar_height(loss: float) -> float:
    """Return a bar's height in nats, from 0.5 (to be visible) to `MOST_LOSS`, also for NaN."""
    return MOST_LOSS if math.isnan(loss) else max(0.5, min(loss, MOST_LOSS))


def loss_bar(loss: float, trained: bool) -> str:
    """Return a loss as an HTML bar; it is paler if the token is not trained."""
    height = round(2 * bar_height(loss))
    style = f"display:inline-block;width:7px;margin:0 1px;padding-top:{round(2 * MOST_LOSS) - height}px"
    return f'<i style="{style};border-bottom:{height}px solid{"" if trained else ";opacity:.4"}"></i>'
