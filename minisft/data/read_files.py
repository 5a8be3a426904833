"""Reading conversations from dirty files, row by row: JSON lists, JSON lines, Parquet, Arrow, or a folder of them.

Nothing is loaded whole but one object around all rows (`{"data": [row, …]}`). Damage is skipped where the next row
can be found, and always has its line in the ledger. The work is linear in the size of a file, however it is damaged.
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
DEEPEST = 1 << 18  # open brackets, of which Python's parser takes a thousand; with more a row has no end
PATIENCE = 1000  # rows without a single conversation before a file is refused
SAMPLE = 1 << 22  # characters of its first rows, by which a file is judged


def read(path: Path | str, ledger: Ledger) -> Iterator[Conversation]:
    """Every usable conversation of a file (JSON, JSON lines, Parquet, Arrow) or of a folder of such, one at a time.

    Counts the stages raw and cleaned. Raises `UserError` if the path is missing, empty, no such file, or without a
    single usable conversation.
    """
    path = Path(path)
    used: dict[str, int] = {}  # every id so far, and how often it came; with its number an id names one row
    rows = 0
    for where, row, escaped in _judged_rows(path, ledger):
        rows += 1
        ledger.count("raw", characters=sum(map(len, texts_of(row))))
        conversation = clean(row, where, ledger, escaped)
        if conversation is None:
            if not used and rows >= PATIENCE:
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
    while True:
        used[name] += 1
        if (numbered := f"{name}#{used[name]}") not in used:
            return numbered


def rows_of(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Every row of a file or folder as it stands, each with a name for it: `chats.json row 7`.

    A row that cannot be read is an `UnusableRow`, the reason for it.
    """
    for file in files_of(path, ledger):
        yield from _rows_of_file(file, ledger)


def _judged_rows(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any, bool]]:
    """The same, and whether the row's file was HTML-escaped, which its first rows tell."""
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
        while sample:  # a row is not kept longer than it is used
            yield *sample.pop(), escaped
        for where, row in rows:
            yield where, row, escaped


def _rows_of_file(file: DataFile, ledger: Ledger) -> Iterator[tuple[str, Any]]:
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
                found = f"it starts with {head[:20]!r}"
                raise UserError(f"data file {file.path} is not JSON, JSON lines or Parquet: {found}")


# --- JSON text ---------------------------------------------------------------------------------------------


class _NoEndError(ValueError):
    """The next value does not end in this file, or not within the longest row."""


class _Text:
    """JSON text of a file, read as it is needed.

    Python's parser is fast, but an error costs it all text before, in which it counts the lines. So one error is
    allowed for each piece that is read; until the next piece, values are then cut out first and parsed alone.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # A byte that is no UTF-8 becomes a lone surrogate, which cleaning replaces and reports.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder(strict=False)  # raw line ends inside a string do no harm
        self._buffer = ""
        self._start = 0  # of what is not used yet
        self._ended = False
        self._had_error = False  # since the last piece was read

    @property
    def next(self) -> str:
        """The next character, or nothing at the end of the file."""
        return self._buffer[self._start : self._start + 1]

    def _more(self) -> bool:
        """Read on: at least a chunk, and as much as there is already, so that long rows cost linear time."""
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
        """Skip white space, and one `mark` with the white space after it if it comes next."""
        self._skip_all(_SPACE)
        if mark and self.next == mark:
            self._start += 1
            self._skip_all(_SPACE)

    def skip_commas(self) -> int:
        """Skip white space and commas; returns how many commas there were."""
        return self._skip_all(_COMMAS)

    def _skip_all(self, characters: re.Pattern[str]) -> int:
        commas = 0
        while True:
            start, self._start = self._start, characters.match(self._buffer, self._start).end()
            commas += self._buffer.count(",", start, self._start)
            if self._start < len(self._buffer) or not self._more():
                return commas

    def take(self) -> Any:
        """The next JSON value, or an `UnusableRow` in its place. Raises `_NoEndError`."""
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
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if not unfinished or not self._more():
                    raise
            else:
                length = end - self._start
                if end < len(self._buffer) or not self._more():  # else a number might go on
                    self._start += length
                    return value

    def _end_of_value(self) -> int:
        """Where the next value ends, whatever it is: at the bracket that closes it, or at a comma outside brackets."""
        while True:
            closing = {"{": "}", "[": "]"}.get(self.next)
            depth = 0
            for match in _MARK.finditer(self._buffer, self._start):
                mark = match[0]
                if (match["open"] is not None) or (match["word"] and match.end() == len(self._buffer)):
                    break  # it may have more to come
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
_MARK = re.compile(  # a string, one without an end, a bracket or a comma, a word
    r'"(?:[^"\\]++|\\.)*+(?:"|(?P<open>))|[\[\]{},]|(?P<word>[^ \t\r\n"\[\]{},]++)', re.DOTALL
)


# --- JSON files --------------------------------------------------------------------------------------------


def _rows_of_list(file: DataFile, stream: io.BufferedReader, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    text = _Text(stream)
    text.skip("[")
    for number in itertools.count():
        where = f"{file.name} row {number}"
        if text.skip_commas() > 1:
            ledger.repair("commas without a row: skipped", where)
        if text.next == "]":
            text.skip("]")
            if text.next:
                ledger.lose(f"{file.name} goes on after its list of {number:,} rows; that was not read")
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
            if first and getattr(error, "msg", "") != "Extra data" and _goes_on(file, ledger):
                yield from _rows_of_objects(file, ledger)
                return
            row = _unreadable(error)
        else:
            if has_comma:
                ledger.repair(COMMA, where)
        if first and not stream.peek(1) and (rows := _wrapped(row, file)) is not None:
            yield from ((f"{file.name} row {i}", row) for i, row in enumerate(rows))
            return
        first = False
        yield where, row


def _goes_on(file: DataFile, ledger: Ledger) -> bool:
    """Whether the first value of a file, which is not on one line, is on several."""
    with _reopened(file, ledger) as stream:
        text = _Text(stream)
        text.skip()
        try:
            return not isinstance(text.take(), UnusableRow)
        except _NoEndError:
            return False


def _reopened(file: DataFile, ledger: Ledger) -> io.BufferedReader:
    stream = open_data(file, ledger)
    if stream.peek(len(BOM)).startswith(BOM):
        stream.read(len(BOM))
    return stream


def _rows_of_objects(file: DataFile, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Objects over many lines, one after another; or one object that has all rows under one key."""
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
    """The rows of `{"data": [row, …]}`, under whatever key; None if `value` is a row itself."""
    if not isinstance(value, dict) or has_known_shape(value):
        return None
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    if len(lists) > 1:
        keys = ", ".join(one_line(key[:80], 40) for key in list(lists)[:8])
        what = f"several lists of rows, under the keys {keys}"
        raise UserError(f"data file {file.path} has {what}: write the one to be read into a file of its own")
    return next(iter(lists.values()), None)
