"""Rows of Parquet and Arrow files, as JSON would have given them: one batch at a time, and checked before it is read.

Damaged Arrow is dangerous: its offsets are used as they stand, and wrong ones end the process. So every batch is
validated whole before a value of it is touched. Columns that nothing reads are not converted.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from minisft.data.data_files import DataFile
from minisft.data.messages import KEYS, UnusableRow
from minisft.errors import UserError

if TYPE_CHECKING:
    import pyarrow

PARQUET = b"PAR1"
ARROW_STREAM, ARROW_FILE = b"\xff\xff\xff\xff", b"ARROW1"
TOKENIZED = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
AT_ONCE = 256  # rows
MOST_PER_BYTE = 1000  # rows, values or unpacked bytes for each byte of a file; more is a bomb
FILLED = object()  # stands for a value that nothing reads
_READ = KEYS | set(TOKENIZED)


def is_table(head: bytes) -> bool:
    """Whether a file that begins with these bytes is Parquet or Arrow."""
    return head.startswith((PARQUET, ARROW_STREAM, ARROW_FILE))


def rows_of_table(file: DataFile, stream: io.BufferedReader, head: bytes) -> Iterator[tuple[str, Any]]:
    """Every row of a Parquet or Arrow file with its name. Raises `UserError` if the file is damaged.

    A row with a value that cannot be read (a text that is not UTF-8, a date before the year 1) is an `UnusableRow`.
    """
    import pyarrow

    kind = "Parquet" if head.startswith(PARQUET) else "Arrow"
    if not stream.seekable():
        raise UserError(f"data file {file.path} is compressed {kind}: unpack it")
    number = 0
    try:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        for batch in _parquet(stream, size) if kind == "Parquet" else _arrow(stream, head):
            _require_room(size * MOST_PER_BYTE, number + batch.num_rows, "rows")
            batch.validate(full=kind == "Arrow")
            for start in range(0, batch.num_rows, AT_ONCE):
                for row in _rows(batch.slice(start, AT_ONCE), kind):
                    yield f"{file.name} row {number}", row
                    number += 1
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError, MemoryError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"data file {file.path} is damaged {kind} ({reason}): fetch or write it again") from error


def _require_room(most: int, claimed: int, what: str) -> None:
    if claimed > most:
        raise ValueError(f"it cannot hold {claimed:,} {what}")


def _parquet(stream: io.BufferedReader, size: int) -> Iterable[pyarrow.RecordBatch]:
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20)
    groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
    for column in (group.column(j) for group in groups for j in range(group.num_columns)):
        _require_room(size * MOST_PER_BYTE, max(column.num_values, column.total_uncompressed_size), "bytes or values")
    return opened.iter_batches(batch_size=AT_ONCE)


def _arrow(stream: io.BufferedReader, head: bytes) -> Iterable[pyarrow.RecordBatch]:
    import pyarrow

    if not head.startswith(ARROW_FILE):
        return iter(pyarrow.ipc.open_stream(stream))
    opened = pyarrow.ipc.open_file(stream)
    return map(opened.get_batch, range(opened.num_record_batches))


def _require_backed(column: pyarrow.Array) -> None:
    """Raise `ValueError` for a list of more values than there is data for: of nothing, or the same ones many times."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_struct(column.type):
        for child in column.flatten():
            _require_backed(child)
    elif types.is_nested(column.type) and not types.is_map(column.type) and not types.is_union(column.type):
        claimed = compute.sum(compute.list_value_length(column)).as_py() or 0
        _require_room(8 * column.nbytes + AT_ONCE * AT_ONCE, claimed, "values")  # true or false takes a bit
        _require_backed(column.flatten())


def _rows(batch: pyarrow.RecordBatch, kind: str) -> Iterator[dict[str, Any] | UnusableRow]:
    columns = {
        name: _values(column) if name in _READ else _filled(column)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        bad = next((name for name, value in row.items() if isinstance(value, UnusableRow)), None)
        yield row if bad is None else UnusableRow(f"damaged {kind}: a value of {bad} cannot be read ({row[bad]})")


def _values(column: pyarrow.Array) -> list[Any]:
    _require_backed(column)
    try:
        return column.to_pylist()
    except (ValueError, ArithmeticError):
        return [_value(cell) for cell in column]


def _value(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, ArithmeticError) as error:
        return UnusableRow(type(error).__name__)


def _filled(column: pyarrow.Array) -> list[Any]:
    """Of a column that nothing reads: where there is more in it than null, `""` or `[]`."""
    import pyarrow.compute
    import pyarrow.types as types

    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_binary(column.type):
        is_filled = pyarrow.compute.greater(pyarrow.compute.binary_length(column), 0)
    elif types.is_list(column.type) or types.is_large_list(column.type):
        is_filled = pyarrow.compute.greater(pyarrow.compute.list_value_length(column), 0)
    else:
        is_filled = column.is_valid()
    return [FILLED if filled else None for filled in is_filled.to_pylist()]
