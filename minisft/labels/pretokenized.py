"""Read data that is already tokenized: rows of `input_ids` and `labels` from any tool.

Formats: JSON lines (as `minisft encode` writes them), a JSON list, Parquet, an Arrow stream or
file, a folder of such files, and a folder written by `save_to_disk` of `datasets`. Only one batch
of rows is in memory at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.data.conversations import UnusableRow
from minisft.data.ledger import Ledger
from minisft.data.messages import as_text
from minisft.data.read_files import rows_of
from minisft.errors import UserError
from minisft.labels.encode_row import IGNORE_INDEX

PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids")


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it; `problem` is why it cannot be read, and then it has no ids.

    `id` is the row's id, or None if it has none; `where` always names the row (file and line).
    """

    where: str
    id: str | None
    input_ids: Any
    labels: Any
    problem: str | None = None


@dataclass(frozen=True)
class Tokenized:
    """The rows of a file or folder; iterating raises `UserError` for a bad file."""

    path: Path

    def __iter__(self) -> Iterator[RawRow]:
        ledger = Ledger()
        empty = True
        for where, row in rows_of(self.path, ledger):
            empty = False
            parts = _parts(row)
            for number, part in enumerate(parts, 1):
                yield _raw(where if len(parts) == 1 else f"{where}, part {number}", part)
        yield from (RawRow(self.path.name, None, None, None, problem) for problem in ledger.lost)
        if empty:
            raise UserError(f"{self.path} has no rows: tokenize the data again")


def is_tokenized(path: Path) -> bool:
    """Whether the first row has a column `input_ids` or `labels`.

    Raises `UserError` if the data cannot be read.
    """
    _, row = next(rows_of(path, Ledger()), (None, None))
    return isinstance(row, dict) and bool({"input_ids", "labels"} & set(row))


def _raw(where: str, row: Any) -> RawRow:
    if isinstance(row, UnusableRow):
        return RawRow(where, None, None, None, str(row))
    if not isinstance(row, dict):
        return RawRow(where, None, None, None, f"a {type(row).__name__}, not an object with input_ids and labels")
    for column in ("input_ids", "labels"):
        if column not in row:
            columns = ", ".join(sorted(map(str, row))[:8]) or "none"
            return RawRow(where, _id(row), None, None, f"no column {column} (its columns: {columns[:200]})")
    if problem := _contradiction(row):
        return RawRow(where, _id(row), None, None, problem)
    ids, labels = _without_padding(row)
    return RawRow(where, _id(row), ids, labels)


def _contradiction(row: dict[str, Any]) -> str:
    """Return how the attention mask or the positions contradict the row; "" if they do not."""
    ids, labels, mask, positions = (row.get(name) for name in PER_TOKEN)
    if not (isinstance(ids, list) and isinstance(labels, list) and len(ids) == len(labels)):
        return ""  # `check_row` reports this
    for name, column in (("attention_mask", mask), ("position_ids", positions)):
        if column is None:
            continue
        if not isinstance(column, list) or len(column) != len(ids) or not all(type(one) is int for one in column):
            return f"{name} is not {len(ids)} whole numbers, one per token"
    visible = [i for i in range(len(ids)) if mask is None or mask[i] != 0]
    if mask is not None:
        hidden = set(range(len(ids))).difference(visible)
        if trained := [i for i in sorted(hidden) if labels[i] != IGNORE_INDEX]:
            return f"token {trained[0]} is trained, but attention_mask hides it"
        if visible and visible[-1] - visible[0] + 1 != len(visible):
            return "attention_mask hides tokens inside the row"
    if positions is not None and [positions[i] for i in visible] != list(range(len(visible))):
        return "position_ids do not count 0, 1, 2, … from the first token"
    return ""


def _parts(row: Any) -> list[Any]:
    """Return the rows that were packed into this one; only itself if it is not packed."""
    if not isinstance(row, dict):
        return [row]
    columns = {name: row[name] for name in PER_TOKEN if isinstance(row.get(name), list)}
    size = len(columns.get("input_ids", ()))
    if any(len(column) != size for column in columns.values()):
        return [row]
    starts = _starts(columns, row.get("seq_lengths"), size)[1:]
    if not starts:
        return [row]
    bounds = zip([0, *starts], [*starts, size], strict=True)  # padding before the first part belongs to it
    return [{name: column[start:stop] for name, column in columns.items()} for start, stop in bounds]


def _starts(columns: dict[str, list[Any]], lengths: Any, size: int) -> list[int]:
    """Return where the parts of a packed row start; empty if no column marks them."""
    mask = columns.get("attention_mask", [1] * size)
    if (positions := columns.get("position_ids")) is not None:
        return [i for i in range(size) if positions[i] == 0 and mask[i] != 0]
    if isinstance(lengths, list) and all(type(n) is int and n > 0 for n in lengths) and sum(lengths) == size:
        return [0, *itertools.accumulate(lengths[:-1])]
    if 2 in mask:  # axolotl numbers the parts in the mask
        return [i for i in range(size) if mask[i] != 0 and (i == 0 or mask[i] != mask[i - 1])]
    return []


def _id(row: dict[str, Any]) -> str | None:
    own = row.get("id")
    return own if isinstance(own, str) else as_text(own)


def _without_padding(row: dict[str, Any]) -> tuple[Any, Any]:
    """Return ids and labels without the padding that `attention_mask` marks.

    A token with a label is not padding.
    """
    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    if mask is None or not all(isinstance(column, list) and len(column) == len(ids) for column in (ids, labels, mask)):
        return ids, labels
    real = [
        i for i, (visible, label) in enumerate(zip(mask, labels, strict=True)) if visible != 0 or label != IGNORE_INDEX
    ]
    return [ids[i] for i in real], [labels[i] for i in real]
