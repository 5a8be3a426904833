"""Read conversations row by row from dirty JSON, JSON lines, Parquet and Arrow files or folders.

Files are streamed; only a single object around all rows (`{"data": [row, …]}`) is loaded whole.
Damage is skipped if the next row can be found, and is always recorded in the ledger. The work is
linear in the size of a file, however it is damaged.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisft.data import json_text
from minisft.data.arrow_tables import is_table, rows_of_table
from minisft.data.conversations import Conversation, UnusableRow, clean
from minisft.data.data_files import DataFile, files_of, open_data
from minisft.data.html_escapes import is_escaped
from minisft.data.json_text import TWICE, JsonText, NoEndError, unreadable_row
from minisft.data.ledger import Ledger
from minisft.data.row_formats import SHAPES, has_known_shape, texts_of
from minisft.errors import UserError
from minisft.text import one_line

COMMA = "comma after a row: removed"
BOM = b"\xef\xbb\xbf"
PATIENCE = 1000  # rows without a usable conversation before a file is refused
SAMPLE = 1 << 22  # characters of the first rows that decide whether a file is HTML-escaped


def read(path: Path | str, ledger: Ledger, is_clean: bool = False, reads_tools: bool = False) -> Iterator[Conversation]:
    """Yield each usable conversation of a file (JSON, JSON lines, Parquet, Arrow) or folder.

    Counts the stages raw and cleaned in `ledger`, and numbers repeated ids so that every id is
    unique. Raises `UserError` if the path does not exist, is empty, has another format, or has no
    usable conversation. A file that was written from clean conversations (`is_clean`) is not judged
    for HTML escaping again: `&lt;` in it is what somebody wrote. `reads_tools`: whether the chat
    template can show tools (`ChatTemplate.has_tools`); otherwise rows with tools are dropped.
    """
    path = Path(path)
    used: dict[str, int] = {}  # id -> the last number tried for a repetition of it
    rows = 0
    for where, row, escaped in _judged_rows(path, ledger):
        rows += 1
        ledger.count("raw", characters=sum(map(len, texts_of(row))))
        conversation = clean(row, where, ledger, escaped and not is_clean, reads_tools)
        if conversation is None:
            if not used and rows >= PATIENCE:  # a large file of another format is refused early
                break
            continue
        if conversation.id in used:
            ledger.repair("id seen before: numbered", conversation.id)
            conversation = replace(conversation, id=_unused_id(conversation.id, used))
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
            yield from rows_of_table(file, stream, head, ledger)
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


# --- JSON files --------------------------------------------------------------------------------------------


def _rows_of_list(file: DataFile, stream: io.BufferedReader, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """The rows of `[row, …]`."""
    text = JsonText(stream)
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
        except NoEndError:
            break
        yield where, row
    if number == 0:
        raise UserError(f"data file {file.path} is not JSON: it has no whole row; fetch or export it again")
    ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows could not be read")


def _rows_of_lines(file: DataFile, stream: io.BufferedReader, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines, or of another file that also begins with `{` or `"`."""
    first = True
    for number, line in enumerate(iter(lambda: stream.readline(json_text.LONGEST_ROW), b""), 1):
        if line.isspace():
            continue
        where = f"{file.name} line {number}"
        text = line.decode("utf-8", "surrogateescape").strip()
        has_comma = text.endswith(",")
        text = text.rstrip(", \t") if has_comma else text
        if not text:
            continue
        try:
            row = json_text.parse_row(text)
        except (ValueError, RecursionError) as error:
            # "Extra data": the line begins with a whole value, so it is a broken line and not the
            # start of a longer object.
            if first and getattr(error, "msg", "") != "Extra data" and _spans_lines(file, ledger):
                yield from _rows_of_objects(file, ledger)
                return
            row = unreadable_row(error)
        else:
            if has_comma:
                ledger.repair(COMMA, where)
        # The only line of a file may be an object around all rows.
        if first and not stream.peek(1) and (rows := _wrapped(row, file, ledger)) is not None:
            yield from ((f"{file.name} row {i}", row) for i, row in enumerate(rows))
            return
        first = False
        yield where, row


def _spans_lines(file: DataFile, ledger: Ledger) -> bool:
    """Whether the first value of a file, invalid on one line, is valid over several lines."""
    with _reopened(file, ledger) as stream:
        text = JsonText(stream)
        text.skip()
        try:
            value = text.take()
            return not isinstance(value, UnusableRow) or str(value) == TWICE
        except NoEndError:
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
        text = JsonText(stream)
        text.skip()
        number = 0
        while text.next:
            where = f"{file.name} row {number}"
            try:
                value = text.take()
            except NoEndError:
                ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows was not read")
                return
            if text.skip_commas():
                ledger.repair(COMMA, where)
            rows = _wrapped(value, file, ledger) if number == 0 else None
            for row in [value] if rows is None else rows:
                yield f"{file.name} row {number}", row
                number += 1


def _wrapped(value: Any, file: DataFile, ledger: Ledger) -> list[Any] | None:
    """The rows of `{"data": [row, …]}`, under any key; None if `value` is itself a row.

    A list is one of rows if any of its items may be a row. A note names the other keys that hold
    lists or objects. Raises `UserError` if several keys hold lists of rows.
    """
    if not isinstance(value, dict) or has_known_shape(value):
        return None
    lists = {k: v for k, v in value.items() if isinstance(v, list) and any(map(_may_be_row, v))}
    if len(lists) > 1:
        keys = ", ".join(one_line(key[:80], 40) for key in list(lists)[:8])
        raise UserError(
            f"data file {file.path} has several lists of rows, under the keys {keys}: "
            "save the list to be read as a separate file"
        )
    beside = [k for k, v in value.items() if k not in lists and isinstance(v, list | dict)]
    if lists and beside:
        keys = ", ".join(one_line(key[:80], 40) for key in beside[:8])
        own = one_line(next(iter(lists))[:80], 40)
        ledger.note(f"{file.name}: the rows are those of the key {own}; other keys that were not read: {keys}")
    return next(iter(lists.values()), None)


def _may_be_row(item: Any) -> bool:
    """Whether an item of a list is an object, a list of turns, or either of them as JSON in a string."""
    return isinstance(item, dict | list) or (isinstance(item, str) and item.lstrip()[:1] in ("{", "["))
