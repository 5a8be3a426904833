"""Reading data that is tokenised already: rows of `input_ids` and `labels`, whichever tool wrote them.

JSON lines (as `minisft encode` writes them) or a JSON list, Parquet, an Arrow stream or file, a folder of such files,
and what `save_to_disk` of `datasets` wrote. One batch of rows is in memory at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.conversations import Unusable
from minisft.errors import UserError
from minisft.ledger import Ledger
from minisft.reading import rows_of

STREAM_START, FILE_START = b"\xff\xff\xff\xff", b"ARROW1"


@dataclass(frozen=True)
class RawRow:
    """One row as it stands; `problem` says why it could not be read, and then it has no ids.

    `id` is the row's own, or None; `where` names it in any case.
    """

    where: str
    id: str | None
    input_ids: Any
    labels: Any
    problem: str | None = None


@dataclass(frozen=True)
class Tokenised:
    """The rows of a file or folder, as often as they are asked for. Iterating raises `UserError` for a bad file."""

    path: Path

    def __iter__(self) -> Iterator[RawRow]:
        ledger = Ledger()
        empty = True
        for where, row in _rows(self.path, ledger):
            empty = False
            yield _raw(where, row)
        yield from (RawRow(self.path.name, None, None, None, what) for what in ledger.lost)
        if empty:
            raise UserError(f"{self.path} has no rows: tokenise the data again")


def is_tokenised(path: Path) -> bool:
    """Whether the data has the columns `input_ids` or `labels`, by its first row. Raises `UserError` if unreadable."""
    if _saved_by_datasets(path) or _is_arrow(path):
        return True
    _, row = next(_rows(path, Ledger()), (None, None))
    return isinstance(row, dict) and bool({"input_ids", "labels"} & set(row))


def _raw(where: str, row: Any) -> RawRow:
    if isinstance(row, Unusable):
        return RawRow(where, None, None, None, str(row))
    if not isinstance(row, dict):
        return RawRow(where, None, None, None, f"a {type(row).__name__}, not an object with input_ids and labels")
    for column in ("input_ids", "labels"):
        if column not in row:
            columns = ", ".join(sorted(map(str, row))[:8]) or "none"
            return RawRow(where, _id(row), None, None, f"no column {column} (its columns: {columns[:200]})")
    ids, labels = _without_padding(row)
    return RawRow(where, _id(row), ids, labels)


def _id(row: dict[str, Any]) -> str | None:
    return None if row.get("id") is None else str(row["id"])


def _without_padding(row: dict[str, Any]) -> tuple[Any, Any]:
    """Padding that an `attention_mask` marks is no part of the row, unless it has labels."""
    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    if not all(isinstance(column, list) and len(column) == len(ids) for column in (ids, labels, mask)):
        return ids, labels
    kept = [i for i, (seen, label) in enumerate(zip(mask, labels, strict=True)) if seen != 0 or label != -100]
    return [ids[i] for i in kept], [labels[i] for i in kept]


# --- files -------------------------------------------------------------------------------------------------


def _rows(path: Path, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        raise UserError(f"data file {path} does not exist: check the path")
    if _saved_by_datasets(path):
        yield from _rows_of_saved(path)
    elif path.is_dir() and not any(path.rglob("*.json*")) and (arrows := sorted(path.rglob("*.arrow"))):
        for file in arrows:
            yield from _rows_of_arrow(file)
    elif path.is_file() and _is_arrow(path):
        yield from _rows_of_arrow(path)
    else:
        yield from rows_of(path, ledger)


def _saved_by_datasets(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _is_arrow(path: Path) -> bool:
    if path.is_dir():
        return False
    if not path.exists():
        raise UserError(f"data file {path} does not exist: check the path")
    with path.open("rb") as stream:
        return stream.read(6).startswith((STREAM_START, FILE_START))


def _rows_of_saved(folder: Path) -> Iterator[tuple[str, Any]]:
    """A `Dataset` (state.json names its files in order) or a `DatasetDict` (a folder for each split)."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            for split in splits:
                yield from ((f"{split} {where}", row) for where, row in _rows_of_saved(folder / split))
            return
        files = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not whole ({error}): save the data set with save_to_disk again") from error
    number = itertools.count()
    for file in files:
        yield from ((f"row {next(number)}", row) for _, row in _rows_of_arrow(folder / file))


def _rows_of_arrow(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    number = 0
    try:
        with file.open("rb") as stream:
            if stream.read(6).startswith(FILE_START):
                opened = pyarrow.ipc.open_file(file)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            else:
                stream.seek(0)
                batches = iter(pyarrow.ipc.open_stream(stream))
            for batch in batches:
                for start in range(0, batch.num_rows, 256):
                    for row in batch.slice(start, 256).to_pylist():
                        yield f"{file.name} row {number}", row
                        number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data file {file} is damaged Arrow ({reason}): write it again") from error
