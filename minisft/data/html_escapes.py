"""Detect and undo accidental HTML escaping of a whole file.

`Write &lt; in the HTML source.` is a correct answer, and `if x &lt; 2` is a damaged one. A single
conversation cannot tell the two apart. A whole file can: by the contexts in which its entities
appear, and by whether it also has plain `<` and `&` characters.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# A file counts as escaped from this many turns with entities in use, and this many kinds of use.
TURNS, KINDS = 3, 2
# Turns with entities in use per turn that cannot have been escaped: files are often merged from
# several sources, so a few unescaped turns prove nothing.
ODD_ONES = 20
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
_QUOTE = r"&(?:quot|apos|#0?39|#34|#x27|#x22);"
# Entities used as the character itself: text about an entity separates it from its neighbors.
_IN_USE = re.compile(
    r"(?P<tag>&lt;/?[A-Za-z!][^<>&]{0,500}&gt;)"
    rf"|(?P<quotation>\w{_QUOTE}|{_QUOTE}\w)"  # or an apostrophe
    r"|(?P<operator>&amp;&amp;|[-=]&gt;|&lt;[-=]|[\w)\]] ?&[lg]t; ?\d|\d ?&[lg]t; ?[\w(])"
)


def is_escaped(texts: Iterable[str], turns: int = TURNS, kinds: int = KINDS) -> bool:
    """Whether these texts were HTML-escaped.

    Requires entities in use in at least `turns` texts and of at least `kinds` kinds (tag,
    quotation, operator), in no fewer texts than those that only mention entities, and almost no
    text with a character that escaping would have replaced.
    """
    used = unused = plain = 0
    kinds_used = set()
    for text in texts:
        if _is_plain(text):
            plain += 1
        elif "&" in text:
            text_kinds = {match.lastgroup for match in _IN_USE.finditer(text)}
            if text_kinds:
                used += 1
            else:
                unused += 1
            kinds_used |= text_kinds
    return used >= max(turns, unused) and len(kinds_used) >= kinds and plain * ODD_ONES <= used


def unescaped(texts: list[str]) -> list[str]:
    """Unescape the texts of one conversation, unless one of them was clearly never escaped."""
    if any(map(_is_plain, texts)):
        return texts
    return [html.unescape(text) if "&" in text else text for text in texts]


def _is_plain(text: str) -> bool:
    """Whether the text has a `<`, `>` or bare `&`, which escaping would have replaced."""
    return "<" in text or ">" in text or ("&" in text and "&" in _ENTITY.sub("", text))
