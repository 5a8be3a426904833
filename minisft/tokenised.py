"""Reading data that is tokenised already: rows of `input_ids` and `labels`, whichever tool wrote them.

JSON lines (as `minisft encode` writes them) or a JSON list, Parquet, an Arrow stream or file, a folder of such files,
and what `save_to_disk` of `datasets` wrote. One batch of rows is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.conversations import Unusable
from minisft.errors import UserError
from minisft.ledger import Ledger
from minisft.messages import as_text
from minisft.reading import rows_of


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
        for where, row in rows_of(self.path, ledger):
            empty = False
            yield _raw(where, row)
        yield from (RawRow(self.path.name, None, None, None, what) for what in ledger.lost)
        if empty:
            raise UserError(f"{self.path} has no rows: tokenise the data again")


def is_tokenised(path: Path) -> bool:
    """Whether the data has the columns `input_ids` or `labels`, by its first row. Raises `UserError` if unreadable."""
    _, row = next(rows_of(path, Ledger()), (None, None))
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
    own = row.get("id")
    return own if isinstance(own, str) else as_text(own)


def _without_padding(row: dict[str, Any]) -> tuple[Any, Any]:
    """Padding that an `attention_mask` marks is no part of the row, unless it has labels."""
    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    if not all(isinstance(column, list) and len(column) == len(ids) for column in (ids, labels, mask)):
        return ids, labels
    kept = [i for i, (seen, label) in enumerate(zip(mask, labels, strict=True)) if seen != 0 or label != -100]
    return [ids[i] for i in kept], [labels[i] for i in kept]
