"""How vocabularies spell text: the pieces of SentencePiece and of byte-level BPE.

SentencePiece writes a space as `▁` and a byte that has no piece as `<0x0A>`. Byte-level BPE (GPT-2)
writes every byte as one printable character, a space as `Ġ`.
"""

from __future__ import annotations

import re

SPACE_MARK = "▁"


def bytes_of_piece(piece: str) -> bytes:
    """The UTF-8 bytes that a piece in SentencePiece's spelling stands for."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (`bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return byte_of | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
