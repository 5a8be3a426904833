"""Make untrusted text safe to show in a terminal, a Markdown page or a figure.

File names, JSON keys, data, a model's answers and other people's run folders all reach such a
place, and in each of them some characters have special effects. `say` is the only function that
prints.
"""

from __future__ import annotations

import errno
import re
import sys
import unicodedata
from typing import TextIO

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|&~$:@=^\"'])")
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))  # decimal, as hardware is sold
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Printable by category but invisible: fillers, a joiner, variation selectors, a blank.
_UNSEEN = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
_UNSEEN |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def harmless(text: str) -> str:
    """Escape every control character except line feeds and tabs, for a terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else spelt(c) for c in text)


def spelt(c: str) -> str:
    """Escape one character: ASCII and undecodable bytes as `\\x1b`, others as `\\u202e`."""
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as `surrogateescape` decodes it
        code -= 0xDC00
        return f"\\x{code:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: object, most: int = 0) -> str:
    """The text on one line, control characters escaped, cut to `most` characters if not 0."""
    line = harmless(" ".join(str(text).split()))
    return line if not most or len(line) <= most else line[: most - 1] + "…"


def in_markdown(text: str) -> str:
    """The text on one line, escaped so that nothing in it is Markdown, HTML or a link."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def in_markdown_block(text: str) -> str:
    """The text as an indented Markdown block, which contains no markup.

    It needs an empty line before it.
    """
    return "\n".join("    " + line for line in harmless(text).splitlines() or [""])


def visible(data: bytes) -> str:
    """`data` with all characters visible: `␣`, `⏎`, `⇥`, `\\xf0` a byte, `\\u200b` invisible."""
    shown, can_carry_accent = "", False  # about the previous character
    for c in data.decode("utf-8", "surrogateescape"):
        category = unicodedata.category(c)[0]
        if c in _SIGNS:
            c, can_carry_accent = _SIGNS[c], False
        elif category in "CZ" or ord(c) in _UNSEEN:
            c, can_carry_accent = spelt(c), False
        elif category == "M" and not can_carry_accent:
            c = f"◌{c}"
        else:
            can_carry_accent = True
        shown += c
    return shown or "∅"


def unit_for(largest: float) -> tuple[float, str]:
    """Return (bytes per unit, name) of the largest unit that is not larger than `largest` bytes."""
    return next(((size, name) for size, name in UNITS if largest >= size), (1.0, "bytes"))


def in_bytes(size: float) -> str:
    """A number of bytes in the unit that fits: `1.50 GB`."""
    unit, name = unit_for(size)
    return f"{size / unit:,.2f} {name}" if unit > 1 else f"{size:,.0f} B"


def in_gigabytes(size: float | None) -> str:
    """A number of bytes for a column in which all have one unit: `0.27 GB`; `-` for None."""
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def say(text: object = "", *, to: TextIO | None = None, end: str = "\n") -> None:
    """Print `text` to standard output, or to the stream `to`, with control characters escaped.

    Characters that the stream's encoding lacks become question marks. A closed stream, or one whose
    reader has ended, is ignored; a full disk raises `OSError`.
    """
    stream = sys.stdout if to is None else to
    if stream is None:  # the stream was closed when the process started
        return
    line = harmless(str(text)) + end
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(line.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except ValueError:  # the stream has been closed
        return
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EBADF, errno.EIO):
            raise


def note(text: object) -> None:
    """Print progress to standard error, so that standard output can be piped."""
    say(text, to=sys.stderr)
