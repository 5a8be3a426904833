"""Reads the JSON values of a text one at a time, and continues after a damaged one.

A streaming parser such as ijson ends at the first error. Scraped files are cut off, glued together, or broken in the
middle of a row, and the rows after the damage are worth having (`tests/data/test_read_files.py` breaks every kind).
"""

from __future__ import annotations

import codecs
import io
import json
import re
from typing import Any

from minisft.data.ledger import UnusableRow

BAD_ROW = "row is not valid JSON"
TWICE = "row has a key twice"
TOO_DEEP = "row is nested too deeply"
CHUNK = 1 << 22  # bytes read at a time
LONGEST_ROW = 1 << 28  # characters; only damage makes a row longer
# Open brackets after which a row is taken to have no end; Python's parser accepts about 1000.
DEEPEST = 1 << 18
_SPACE, _COMMAS = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
# A complete string, a string without an end (`open`), a bracket or comma, or a word.
_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|(?P<open>))|[\[\]{},]|(?P<word>[^ \t\r\n"\[\]{},]++)', re.DOTALL)


class NoEndError(ValueError):
    """The next value does not end in this file or within `LONGEST_ROW` characters."""


class KeyTwiceError(ValueError):
    """An object has a key twice: readers differ in which value they take."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise KeyTwiceError
    return values


# `strict=False` accepts raw line ends inside strings.
_JSON = json.JSONDecoder(strict=False, object_pairs_hook=_object_of)


def parse_row(text: str) -> Any:
    """The JSON value that is all of `text`. Raises `ValueError` or `RecursionError`."""
    return _JSON.decode(text)


class JsonText:
    """The JSON text of a file, read in chunks as needed.

    Python's parser is fast, but each error costs time proportional to all text before it, because
    the error reports a line number. So only one error is allowed per chunk; after it, until the
    next chunk, each value is cut out first and parsed by itself.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # A byte that is not UTF-8 becomes a lone surrogate, which `clean` replaces and reports.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer = ""
        self._start = 0  # index in the buffer of the first unused character
        self._ended = False
        self._had_error = False  # whether the parser failed since the last chunk was read

    @property
    def next(self) -> str:
        """The next character, or `""` at the end of the file."""
        return self._buffer[self._start : self._start + 1]

    def _more(self) -> bool:
        """Read the next chunk; False at the end of the file or if the row is too long.

        A chunk is at least as long as the unused text, so that a long row costs linear time.
        """
        if self._ended or len(self._buffer) - self._start > LONGEST_ROW:
            return False
        self._buffer = self._buffer[self._start :]
        self._start = 0
        data = self._stream.read(max(CHUNK, len(self._buffer)))
        self._ended = not data
        self._buffer += self._decoder.decode(data, final=self._ended)
        self._had_error = False
        return not self._ended

    def skip(self, mark: str = "") -> None:
        """Skip white space, then one `mark`, if it comes next, and the white space after it."""
        self._skip_all(_SPACE)
        if mark and self.next == mark:
            self._start += 1
            self._skip_all(_SPACE)

    def skip_commas(self) -> int:
        """Skip white space and commas; returns the number of commas."""
        return self._skip_all(_COMMAS)

    def _skip_all(self, characters: re.Pattern[str]) -> int:
        commas = 0
        while True:
            match = characters.match(self._buffer, self._start)
            assert match is not None  # both patterns also match the empty text
            start, self._start = self._start, match.end()
            commas += self._buffer.count(",", start, self._start)
            if self._start < len(self._buffer) or not self._more():
                return commas

    def take(self) -> Any:
        """The next JSON value, or an `UnusableRow` if it is damaged. Raises `NoEndError`."""
        if not self._had_error:
            try:
                return self._parsed()
            except (ValueError, RecursionError):
                self._had_error = True
        end = self._end_of_value()
        start, self._start = self._start, end
        try:
            return parse_row(self._buffer[start:end])
        except (ValueError, RecursionError) as error:
            return unreadable_row(error)

    def _parsed(self) -> Any:
        while True:
            try:
                value, end = _JSON.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                # An error near the end of the buffer may only mean that the value continues. 16
                # characters are longer than any literal or escape that can be split there.
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if not unfinished or not self._more():
                    raise
            else:
                length = end - self._start
                if end < len(self._buffer) or not self._more():  # a number at the end may have more digits
                    self._start += length
                    return value

    def _end_of_value(self) -> int:
        """Index of the end of the next value, valid or not.

        It ends at the bracket that closes it, or before a comma outside brackets.
        """
        while True:
            closing = {"{": "}", "[": "]"}.get(self.next)
            depth = 0
            for match in _MARK.finditer(self._buffer, self._start):
                mark = match[0]
                if (match["open"] is not None) or (match["word"] and match.end() == len(self._buffer)):
                    break  # the string or word may continue in the next chunk
                if closing is None:
                    return match.end()
                if mark in ("{", "["):
                    depth += 1
                elif mark in ("}", "]"):
                    depth = max(0, depth - 1)
                if depth == 0 and mark in (closing, ","):
                    return match.start() if mark == "," else match.end()
                if depth > DEEPEST:
                    raise NoEndError
            if not self._more():
                raise NoEndError


def unreadable_row(error: Exception) -> UnusableRow:
    if isinstance(error, KeyTwiceError):
        return UnusableRow(TWICE)
    return UnusableRow(TOO_DEEP if isinstance(error, RecursionError) else BAD_ROW)
