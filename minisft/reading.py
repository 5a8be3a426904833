"""Reading conversations from dirty files, row by row: JSON lists, JSON lines, Parquet, or a folder of them.

Nothing is loaded whole but one object around all rows (`{"data": [row, …]}`). Damage is skipped where the next row
can be found, and always has its line in the ledger.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.conversations import SHAPES, Conversation, Unusable, clean, either
from minisft.errors import UserError
from minisft.ledger import Ledger

BAD_ROW = "row is not valid JSON"
TOO_DEEP = "row is nested too deeply"
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 22  # bytes read at a time
LONGEST_ROW = 1 << 29  # characters; only damage makes a row longer
PATIENCE = 1000  # rows without a single conversation before a file is refused


def read(path: Path | str, ledger: Ledger) -> Iterator[Conversation]:
    """Every usable conversation of a file (JSON, JSON lines, Parquet) or of a folder of such files, one at a time.

    Counts the stages raw and cleaned. Raises `UserError` if the path is missing, empty, no such file, or without a
    single usable conversation.
    """
    path = Path(path)
    used: dict[str, int] = {}  # every id so far, and how often it came; with its number an id names one row
    rows = 0
    for where, row in rows_of(path, ledger):
        rows += 1
        ledger.count("raw", characters=_characters(row))
        conversation = clean(row, where, ledger)
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

    A row that cannot be read is an `Unusable`, the reason for it.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".json", ".jsonl", ".parquet"} and p.is_file())
        files = [p for p in files if not p.name.startswith("dataset_info")]  # the hub's own description of the data
        if not files:
            raise UserError(f"folder {path} has no .json, .jsonl or .parquet file: give a file of conversations")
    else:
        files = [path]
    for file in files:
        if not file.exists():
            raise UserError(f"data file {file} does not exist: check the path, or use --data sharegpt")
        if file.stat().st_size == 0:
            raise UserError(f"data file {file} is empty: fetch or export it again")
        yield from _rows_of_file(file, ledger)


def _rows_of_file(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        yield from _rows_of_parquet(file)
        return
    if head.startswith(BOM):
        ledger.repair("byte-order mark: removed", file.name)
    match head.removeprefix(BOM).lstrip()[:1]:
        case b"[":
            yield from _rows_of_list(file, ledger)
        case b"{" | b'"':
            yield from _rows_of_lines(file, ledger)
        case b"":
            raise UserError(f"data file {file} is empty: fetch or export it again")
        case _:
            raise UserError(f"data file {file} is not JSON, JSON lines or Parquet: it starts with {head[:20]!r}")


# --- a JSON list -------------------------------------------------------------------------------------------


def _rows_of_list(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    text = _Text(file)
    text.skip("[")
    for number in itertools.count():
        text.skip(",")
        if text.next == "]":
            text.skip("]")
            if text.next:
                ledger.lose(f"{file.name} goes on after its list of {number:,} rows; that was not read")
            return
        try:
            row = text.take()
        except (ValueError, RecursionError) as error:
            if not text.skip_value():
                break
            row = _unreadable(error)
        yield f"{file.name} row {number}", row
    if number == 0:
        raise UserError(f"data file {file} is not JSON: it has no whole row; fetch or export it again")
    ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows could not be read")


def _unreadable(error: Exception) -> Unusable:
    return Unusable(TOO_DEEP if isinstance(error, RecursionError) else BAD_ROW)


class _Text:
    """JSON text of a file, read as it is needed."""

    def __init__(self, file: Path):
        self._stream = file.open("rb")
        if self._stream.read(len(BOM)) != BOM:
            self._stream.seek(0)
        # A byte that is no UTF-8 becomes a lone surrogate, which cleaning replaces and reports.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder(strict=False)  # raw line ends inside a string do no harm
        self._buffer = ""
        self._start = 0  # of what is not used yet
        self._ended = False

    @property
    def next(self) -> str:
        """The next character, or nothing at the end of the file."""
        return self._buffer[self._start : self._start + 1]

    def _more(self) -> bool:
        """Read on: at least a chunk, and as much as there is already, so that long rows cost linear time."""
        self._buffer = self._buffer[self._start :]
        self._start = 0
        if self._ended or len(self._buffer) > LONGEST_ROW:
            return False
        data = self._stream.read(max(CHUNK, len(self._buffer)))
        self._ended = not data
        self._buffer += self._decoder.decode(data, final=self._ended)
        if self._ended:
            self._stream.close()
        return not self._ended

    def skip(self, mark: str = "") -> None:
        """Skip white space, and one `mark` with the white space after it if it comes next."""
        for text in (mark, ""):
            while True:
                self._start = _SPACE.match(self._buffer, self._start).end()
                if self._start < len(self._buffer) or not self._more():
                    break
            if text and self.next == text:
                self._start += 1

    def take(self) -> Any:
        """The next JSON value. Raises `ValueError` or `RecursionError`, having used up nothing."""
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if not unfinished or not self._more():
                    raise
            else:
                if end < len(self._buffer):
                    self._start = end
                    return value
                used = end - self._start
                if not self._more():  # else a number might go on
                    self._start = used
                    return value

    def skip_value(self) -> bool:
        """Skip what cannot be parsed, up to the comma or bracket that ends it in its list; False if there is none."""
        while True:
            depth = 0
            for match in _MARK.finditer(self._buffer, self._start):
                if match[0] in ",]" and depth == 0:
                    self._start = match.start()
                    return True
                if match[0] in "{[":
                    depth += 1
                elif match[0] in "}]":
                    depth = max(0, depth - 1)
                elif match[0] != "," and not match[1]:
                    break  # a string that goes on
            if not self._more():
                return False


_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+(")?|[\[\]{},]', re.DOTALL)


# --- JSON lines --------------------------------------------------------------------------------------------


def _rows_of_lines(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    first = True
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW), b""), 1):
            text = line.removeprefix(BOM if number == 1 else b"").decode("utf-8", "surrogateescape").strip()
            if not text:
                continue
            try:
                row = json.loads(text, strict=False)
            except (ValueError, RecursionError) as error:
                if first and getattr(error, "msg", "") != "Extra data" and _goes_on(file):
                    yield from _rows_of_objects(file, ledger)
                    return
                row = _unreadable(error)
            if first and (rows := _wrapped(row)) is not None and not stream.peek(1):
                yield from ((f"{file.name} row {i}", row) for i, row in enumerate(rows))
                return
            first = False
            yield f"{file.name} line {number}", row


def _goes_on(file: Path) -> bool:
    """Whether the first value of a file, which is not on one line, is on several."""
    text = _Text(file)
    text.skip()
    try:
        text.take()
    except (ValueError, RecursionError):
        return False
    return True


def _rows_of_objects(file: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Objects over many lines, one after another; or one object that has all rows under one key."""
    text = _Text(file)
    text.skip()
    number = 0
    while text.next:
        try:
            value = text.take()
        except (ValueError, RecursionError):
            ledger.lose(f"{file.name} is cut off or damaged after {number:,} whole rows; what follows was not read")
            return
        rows = _wrapped(value) if number == 0 else None
        for row in [value] if rows is None else rows:
            yield f"{file.name} row {number}", row
            number += 1
        text.skip()


def _wrapped(value: Any) -> list[Any] | None:
    """The rows of `{"data": [row, …]}`, under whatever key; None if `value` is a row itself."""
    if not isinstance(value, dict) or {"conversations", "messages", "instruction"} & set(value):
        return None
    lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    return lists[0] if len(lists) == 1 else None


# --- Parquet -----------------------------------------------------------------------------------------------


def _rows_of_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{file.name} row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data file {file} is damaged Parquet ({reason}): fetch it again") from error


def _characters(row: Any) -> int:
    """The text in a raw row, whatever its shape."""
    if isinstance(row, str):
        return len(row)
    if not isinstance(row, dict):
        return 0
    turns = next((row[key] for key in ("conversations", "messages") if isinstance(row.get(key), list | str)), None)
    if turns is None:
        texts = (row.get(key) for key in ("system", "instruction", "input", "output"))
        return sum(len(text) for text in texts if isinstance(text, str))
    if isinstance(turns, str):
        return len(turns)
    texts = (either(turn, "value", "content") for turn in turns if isinstance(turn, dict))
    return sum(len(text) for text in texts if isinstance(text, str))
