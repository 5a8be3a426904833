"""Read conversations row by row from dirty JSON, JSON lines, Parquet and Arrow files or folders.

Files are streamed; only a single object around all rows (`{"data": [row, …]}`) is loaded whole.
Damage is skipped if the next row can be found, and is always recorded in the ledger. The work is
linear in the size of a file, however it is damaged.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.data.arrow_tables import is_table, rows_of_table
from minisft.data.conversations import Conversation, UnusableRow, clean
from minisft.data.data_files import DataFile, files_of, open_data
from minisft.data.html_escapes import is_escaped
from minisft.data.ledger import Ledger
from minisft.data.row_formats import SHAPES, has_known_shape, texts_of
from minisft.errors import UserError
from minisft.text import one_line

BAD_ROW = "row is not valid JSON"
TOO_DEEP = "row is nested too deeply"
COMMA = "comma after a row: removed"
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 22  # bytes read at a time
LONGEST_ROW = 1 << 28  # characters; only damage makes a row longer
# Open brackets after which a row is taken to have no end; Python's parser accepts about 1000.
DEEPEST = 1 << 18
PATIENCE = 1000  # rows without a usable conversation before a file is refused
SAMPLE = 1 << 22  # characters of the first rows that decide whether a file is HTML-escaped


def read(path: Path | str, ledger: Ledger) -> Iterator[Conversation]:
    """Yield each usable conversation of a file (JSON, JSON lines, Parquet, Arrow) or folder.

    Counts the stages raw and cleaned in `ledger`, and numbers repeated ids so that every id is
    unique. Raises `UserError` if the path does not exist, is empty, has another format, or has no
    usable conversation.
    """
    path = Path(path)
    used: dict[str, int] = {}  # id -> the last number tried for a repetition of it
    rows = 0
    for where, row, escaped in _judged_rows(path, ledger):
        rows += 1
        ledger.count("raw", characters=sum(map(len, texts_of(row))))
        conversation = clean(row, where, ledger, escaped)
        if conversation is None:
            if not used and rows >= PATIENCE:  # a large file of another format is refused early
                break
            continue
        if conversation.id in used:
            ledger.repair("id seen before: numbered", conversation.id)
            conversation = Conversation(_unused_id(conversation.id, used), conversation.messages)
        used[conversation.id] = 1
        ledger.count("cleaned", characters=conversation.characters)
        yield conversation
    if not used:
        reasons = sorted(ledger.dropped.items(), key=lambda item: -item[1].rows)[:3]
        why = ", ".join(f"{reason} ({entry.rows})" for reason, entry in reasons)
        why = why or "; ".join(ledger.lost) or "no rows"
        among = f" in its first {rows:,} rows" if rows >= PATIENCE else ""
        raise UserError(f"{path} has no usable conversation{among}: {why}; give rows with {SHAPES}")


def _unused_id(name: str, used: dict[str, int]) -> str:
    """The id with the next number that makes it unique: `a#2`, `a#3`, …"""
    while True:
        used[name] += 1
        if (numbered := f"{name}#{used[name]}") not in used:
            return numbered


def rows_of(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Yield each raw row of a file or folder as a pair of its name (`chats.json row 7`) and value.

    The value of a row that cannot be read is an `UnusableRow` with the reason. Raises `UserError`
    as `read` does for the path and format.
    """
    for file in files_of(path, ledger):
        yield from _rows_of_file(file, ledger)


def _judged_rows(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any, bool]]:
    """Like `rows_of`, plus whether the row's file was HTML-escaped, judged by its first rows."""
    for file in files_of(path, ledger):
        rows = _rows_of_file(file, ledger)
        sample: list[tuple[str, Any]] = []
        characters = 0
        for where, row in itertools.islice(rows, PATIENCE):
            sample.append((where, row))
            characters += sum(map(len, texts_of(row)))
            if characters > SAMPLE:
                break
        escaped = is_escaped(text for _, row in sample for text in texts_of(row))
        sample.reverse()
        while sample:  # pop, to free the memory of each row after its use
            where, row = sample.pop()
            yield where, row, escaped
        for where, row in rows:
            yield where, row, escaped


def _rows_of_file(file: DataFile, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Choose the reader by the first bytes of the file, not by its name."""
    with open_data(file, ledger) as stream:
        head = stream.peek()
        if is_table(head):
            yield from rows_of_table(file, stream, head)
            return
        if head.startswith(BOM):
            ledger.repair("byte-order mark: removed", file.name)
            stream.read(len(BOM))
        match head.removeprefix(BOM).lstrip()[:1]:
            case b"[":
                yield from _rows_of_list(file, stream, ledger)
            case b"{" | b'"':
                yield from _rows_of_lines(file, stream, ledger)
            case b"":
                raise UserError(f"data file {file.path} is empty: fetch or export it again")
            case _:
                raise UserError(
                    f"data file {file.path} is not JSON, JSON lines or Parquet: it starts with {head[:20]!r}"
                )


# --- JSON text ---------------------------------------------------------------------------------------------


class _NoEndError(ValueError):
    """The next value does not end in this file or within `LONGEST_ROW` characters."""


class _Text:
    """The JSON text of a file, read in chunks as needed.

    Python's parser is fast, but each error costs time proportional to all text before it, because
    the error reports a line number. So only one error is allowed per chunk; after it, until the
    next chunk, each value is cut out first and parsed by itself.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # A byte that is not UTF-8 becomes a lone surrogate, which `clean` replaces and reports.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder(strict=False)  # accept raw line ends inside strings
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
        """The next JSON value, or an `UnusableRow` if it is damaged. Raises `_NoEndError`."""
        if not self._had_error:
            try:
                return self._parsed()
            except (ValueError, RecursionError):
                self._had_error = True
        end = self._end_of_value()
        start, self._start = self._start, end
        try:
            return json.loads(self._buffer[start:end], strict=False)
        except (ValueError, RecursionError) as error:
            return _unreadable(error)

    def _parsed(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._start)
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
                    raise _NoEndError
            if not self._more():
                raise _NoEndError


def _unreadable(error: Exception) -> UnusableRow:
    return UnusableRow(TOO_DEEP if isinstance(error, RecursionError) else BAD_ROW)


_SPACE, _COMMAS = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
# A complete string, a string without an end (`open`), a bracket or comma, or a word.
_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|(?P<open>))|[\[\]{},]|(?P<word>[^ \t\r\n"\[\]{},]++)', re.DOTALL)


# --- JSON files --------------------------------------------------------------------------------------------


def _rows_of_list(file: DataFile, stream: io.BufferedReader, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """The rows of `[row, …]`."""
    text = _Text(stream)
    text.skip("[")
    for number in itertools.count():
        where = f"{file.name} row {number}"
        if text.skip_commas() > 1:
            ledger.repair("commas without a row: skipped", where)
        if text.next == "]":
            text.skip("]")
            if text.next:
                ledger.lose(f"{file.name} has more text after its list of {number:,} rows, which was not read")
            return
        try:
            row = text.take()
        except _NoEndError:
            break
        yield where, row
    if number == 0:
        raise UserError(f"data file {file.path} is not JSON: it has no whole row; fetch or export it again")
    ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows could not be read")


def _rows_of_lines(file: DataFile, stream: io.BufferedReader, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines, or of another file that also begins with `{` or `"`."""
    first = True
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW), b""), 1):
        if line.isspace():
            continue
        where = f"{file.name} line {number}"
        text = line.decode("utf-8", "surrogateescape").strip()
        has_comma = text.endswith(",")
        text = text.rstrip(", \t") if has_comma else text
        if not text:
            continue
        try:
            row = json.loads(text, strict=False)
        except (ValueError, RecursionError) as error:
            # "Extra data": the line begins with a whole value, so it is a broken line and not the
            # start of a longer object.
            if first and getattr(error, "msg", "") != "Extra data" and _spans_lines(file, ledger):
                yield from _rows_of_objects(file, ledger)
                return
            row = _unreadable(error)
        else:
            if has_comma:
                ledger.repair(COMMA, where)
        # The only line of a file may be an object around all rows.
        if first and not stream.peek(1) and (rows := _wrapped(row, file)) is not None:
            yield from ((f"{file.name} row {i}", row) for i, row in enumerate(rows))
            return
        first = False
        yield where, row


def _spans_lines(file: DataFile, ledger: Ledger) -> bool:
    """Whether the first value of a file, invalid on one line, is valid over several lines."""
    with _reopened(file, ledger) as stream:
        text = _Text(stream)
        text.skip()
        try:
            return not isinstance(text.take(), UnusableRow)
        except _NoEndError:
            return False


def _reopened(file: DataFile, ledger: Ledger) -> io.BufferedReader:
    """The file from its beginning, without a byte-order mark (which is already in the ledger)."""
    stream = open_data(file, ledger)
    if stream.peek(len(BOM)).startswith(BOM):
        stream.read(len(BOM))
    return stream


def _rows_of_objects(file: DataFile, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """The rows of consecutive multi-line objects, or of one object with all rows under a key."""
    with _reopened(file, ledger) as stream:
        text = _Text(stream)
        text.skip()
        number = 0
        while text.next:
            where = f"{file.name} row {number}"
            try:
                value = text.take()
            except _NoEndError:
                ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows was not read")
                return
            if text.skip_commas():
                ledger.repair(COMMA, where)
            rows = _wrapped(value, file) if number == 0 else None
            for row in [value] if rows is None else rows:
                yield f"{file.name} row {number}", row
                number += 1


def _wrapped(value: Any, file: DataFile) -> list[Any] | None:
    """The rows of `{"data": [row, …]}`, under any key; None if `value` is itself a row.

    Raises `UserError` if several keys hold lists of rows.
    """
    if not isinstance(value, dict) or has_known_shape(value):
        return None
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    if len(lists) > 1:
        keys = ", ".join(one_line(key[:80], 40) for key in list(lists)[:8])
        raise UserError(
            f"data file {file.path} has several lists of rows, under the keys {keys}: "
            "save the list to be read as a separate file"
        )
    return next(iter(lists.values()), None)
