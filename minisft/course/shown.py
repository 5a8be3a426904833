"""One sentence in a notebook, as text and as HTML."""

from __future__ import annotations

from html import escape

from minisft.text import harmless


class Shown:
    """One sentence in a notebook, with a mark for right and wrong."""

    def __init__(self, text: str, ok: bool | None = None):
        self.text, self.ok = harmless(text), ok

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        mark, color = {None: ("✎", "#888"), True: ("✓", "#009E73"), False: ("✗", "#D55E00")}[self.ok]
        text = escape(self.text).replace("\n", "<br>")
        return f'<div style="border-left:4px solid {color};padding:4px 10px">{mark} {text}</div>'
