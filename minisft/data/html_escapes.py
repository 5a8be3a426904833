"""HTML escaping by mistake: whether the texts of a file went through it, and how to undo it.

`Write &lt; in the HTML source.` is a right answer, and `if x &lt; 2` is a damaged one. One conversation does not tell
which of the two it is; a whole file does, by where its entities stand, and by the absence of plain `<` and `&`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

TURNS, KINDS = 3, 2  # with entities in use, and kinds of use, before a file counts as escaped
ODD_ONES = 20  # turns with entities in use for each that cannot have been escaped: files are put together from others
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
_QUOTE = r"&(?:quot|apos|#0?39|#34|#x27|#x22);"
_IN_USE = re.compile(  # entities in the place of their characters: who speaks of an entity sets it apart
    r"(?P<tag>&lt;/?[A-Za-z!][^<>&]{0,500}&gt;)"
    rf"|(?P<quotation>\w{_QUOTE}|{_QUOTE}\w)"  # or an apostrophe
    r"|(?P<operator>&amp;&amp;|[-=]&gt;|&lt;[-=]|[\w)\]] ?&[lg]t; ?\d|\d ?&[lg]t; ?[\w(])"
)


def is_escaped(texts: Iterable[str], turns: int = TURNS, kinds: int = KINDS) -> bool:
    """Whether these texts were escaped: entities in use in so many of them, and hardly any text that never was.

    Escaped text has entities, no `<` or `>`, and no `&` that starts none.
    """
    used = unused = plain = 0
    found = set()
    for text in texts:
        if _is_plain(text):
            plain += 1
        elif "&" in text:
            uses = {match.lastgroup for match in _IN_USE.finditer(text)}
            used += bool(uses)
            unused += not uses
            found |= uses
    return used >= max(turns, unused) and len(found) >= kinds and plain * ODD_ONES <= used


def unescaped(texts: list[str]) -> list[str]:
    """The texts of one conversation of an escaped file, unescaped unless one of them never was escaped."""
    return texts if any(map(_is_plain, texts)) else [html.unescape(text) if "&" in text else text for text in texts]


def _is_plain(text: str) -> bool:
    """Whether the text has a character that escaping would have replaced."""
    return "<" in text or ">" in text or ("&" in text and "&" in _ENTITY.sub("", text))
