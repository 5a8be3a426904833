"""The token lens: every token of a row with its label, in a notebook or a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from minisft.labels import IGNORE_INDEX, Row
from minisft.tokens import Tokenizer

# Okabe and Ito's palette tells the two apart for every kind of colour vision; the mark below it does in print.
_STYLE = {
    True: "background:#E69F00;color:#000;border-bottom:3px solid #7a4b00",
    False: "background:#dde3ea;color:#222;border-bottom:3px dotted #8a94a0",
}


@dataclass(frozen=True, repr=False)
class Lens:
    """Shows `row`: in a notebook as coloured tokens, in a terminal or as text as one line per token."""

    row: Row
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        return f"{len(self.row.input_ids)} tokens, {self.row.trained} of them trained"

    def __str__(self) -> str:
        lines = [f"{'position':>8} {'id':>7} {'label':>7}  token"]
        for i, (token_id, label) in enumerate(zip(self.row.input_ids, self.row.labels, strict=True)):
            mark = "" if label == IGNORE_INDEX else "  <- trained"
            lines.append(f"{i:>8} {token_id:>7} {label:>7}  {_printable(self.tokenizer.piece(token_id))}{mark}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        spans = []
        for i, (token_id, label) in enumerate(zip(self.row.input_ids, self.row.labels, strict=True)):
            trained = label != IGNORE_INDEX
            title = f"position {i}, id {token_id}, label {label}"
            token = escape(_printable(self.tokenizer.piece(token_id)))
            spans.append(
                f'<span title="{escape(title)}" style="{_STYLE[trained]};padding:1px 3px;margin:1px;'
                f'border-radius:3px;display:inline-block;white-space:pre">{token}</span>'
            )
        summary = repr(self)
        legend = (
            f'<span style="{_STYLE[False]};padding:1px 4px">prompt: label -100</span> '
            f'<span style="{_STYLE[True]};padding:1px 4px">trained: label = id</span>'
        )
        return (
            f'<div role="img" aria-label="{escape(summary)}" style="font-family:monospace;line-height:2.1">'
            f'{"".join(spans)}</div><div style="font-size:85%;margin-top:4px">{summary}. {legend}</div>'
        )


def _printable(text: str) -> str:
    """No control character reaches the terminal: escape codes in a token must not act there."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
