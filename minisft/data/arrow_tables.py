"""Read rows of Parquet and Arrow files in checked batches, in the form that JSON would give.

Damaged Arrow is dangerous: pyarrow uses its offsets as they are, and wrong ones crash the process.
So each batch is validated in full before any of its values is accessed. Columns that nothing reads
are not converted.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from minisft.data.data_files import DataFile
from minisft.data.ledger import Ledger
from minisft.data.messages import KEYS, UnusableRow
from minisft.errors import UserError

if TYPE_CHECKING:
    import pyarrow

PARQUET = b"PAR1"
ARROW_STREAM, ARROW_FILE = b"\xff\xff\xff\xff", b"ARROW1"
TOKENIZED = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
AT_ONCE = 256  # rows converted to Python objects at a time
# Rows, values or unpacked bytes per byte of the file. A file that claims more is a bomb.
MOST_PER_BYTE = 1000
LEAST_BATCH, RATIO = 1 << 30, 100  # bytes allowed for a batch of any file, and per byte of the file
FILLED = object()  # placeholder for a value in a column that nothing reads
_READ = KEYS | set(TOKENIZED)


def is_table(head: bytes) -> bool:
    """Whether a file that begins with these bytes is Parquet or Arrow."""
    return head.startswith((PARQUET, ARROW_STREAM, ARROW_FILE))


def rows_of_table(file: DataFile, stream: io.BufferedReader, head: bytes, ledger: Ledger) -> Iterator[tuple[str, Any]]:
    """Yield each row of a Parquet or Arrow file as a pair of its name and its values.

    `stream` is the open file and `head` its first bytes. `ledger` records an Arrow stream that does
    not end where its file ends. A row with an unreadable value (text that
    is not UTF-8, a date before the year 1) is an `UnusableRow`. Raises `UserError` if the file is
    damaged or compressed as a whole.
    """
    import pyarrow

    kind = "Parquet" if head.startswith(PARQUET) else "Arrow"
    if not stream.seekable():
        raise UserError(f"data file {file.path} is compressed {kind}: unpack it")
    number = 0
    try:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        watched = _Watched(stream)
        for batch in _parquet_batches(stream, size) if kind == "Parquet" else _arrow_batches(watched, head):
            _require_plausible(size * MOST_PER_BYTE, number + batch.num_rows, "rows")
            # The Parquet reader builds its own offsets; Arrow takes them from the file.
            batch.validate(full=kind == "Arrow")
            _require_plausible(max(LEAST_BATCH, size * RATIO), batch.nbytes, "bytes in one batch")
            _require_one_column_each(batch)
            for start in range(0, batch.num_rows, AT_ONCE):
                for row in _rows(batch.slice(start, AT_ONCE), kind):
                    yield f"{file.name} row {number}", row
                    number += 1
        if head.startswith(ARROW_STREAM) and (problem := watched.end_problem(size)):
            ledger.lose(f"{file.name} {problem} after {number:,} rows")
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError, MemoryError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"data file {file.path} is damaged {kind} ({reason}): fetch or write it again") from error


def _require_plausible(most: int, claimed: int, what: str) -> None:
    """Raise `ValueError` if a file claims more than `most` of something."""
    if claimed > most:
        raise ValueError(f"it cannot hold {claimed:,} {what}")


def _parquet_batches(stream: io.BufferedReader, size: int) -> Iterable[pyarrow.RecordBatch]:
    import pyarrow.parquet

    parquet_file = pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20)
    groups = [parquet_file.metadata.row_group(i) for i in range(parquet_file.metadata.num_row_groups)]
    # The metadata states the unpacked sizes, so a bomb is refused before anything is unpacked.
    for column in (group.column(j) for group in groups for j in range(group.num_columns)):
        largest = max(column.num_values, column.total_uncompressed_size)
        _require_plausible(size * MOST_PER_BYTE, largest, "bytes or values")
    return parquet_file.iter_batches(batch_size=AT_ONCE)


def _arrow_batches(stream: _Watched, head: bytes) -> Iterable[pyarrow.RecordBatch]:
    import pyarrow

    if not head.startswith(ARROW_FILE):
        return iter(pyarrow.ipc.open_stream(stream))
    arrow_file = pyarrow.ipc.open_file(stream)
    return map(arrow_file.get_batch, range(arrow_file.num_record_batches))


class _Watched:
    """A file that pyarrow reads, and whether its reader wanted more than the file had.

    An Arrow stream ends with a mark of its own, so nothing is read beyond it.
    """

    closed = False

    def __init__(self, stream: io.BufferedReader):
        self._stream, self._ran_out = stream, False
        self.tell, self.seek, self.seekable = stream.tell, stream.seek, stream.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._ran_out = self._ran_out or len(data) < size
        return data

    def end_problem(self, size: int) -> str:
        """How the end of an Arrow stream, which has been read, differs from the end of its file."""
        if self.tell() < size:
            return "has more data, which was not read,"
        return "is cut off" if self._ran_out else ""


def _require_one_column_each(batch: pyarrow.RecordBatch) -> None:
    """Raise `ValueError` if two columns that are read have one name."""
    names = [name for name in batch.schema.names if name in _READ]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"two of its columns are called {twice[0]}")


def _require_backed(column: pyarrow.Array) -> None:
    """Raise `ValueError` for lists that claim more values than their data can hold.

    Such lists contain nulls that take no space, or refer to the same values many times.
    """
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_struct(column.type):
        for child in column.flatten():
            _require_backed(child)
    elif types.is_nested(column.type) and not types.is_map(column.type) and not types.is_union(column.type):
        claimed = compute.sum(compute.list_value_length(column)).as_py() or 0
        # The smallest value, a boolean, takes one bit: up to 8 values per byte.
        _require_plausible(8 * column.nbytes + AT_ONCE * AT_ONCE, claimed, "values")
        _require_backed(column.flatten())


def _rows(batch: pyarrow.RecordBatch, kind: str) -> Iterator[dict[str, Any] | UnusableRow]:
    columns = {
        name: _values(column) if name in _READ else _placeholders(column)
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
    except (ValueError, ArithmeticError):  # convert value by value, so that one bad value costs only its row
        return [_value(cell) for cell in column]


def _value(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, ArithmeticError) as error:
        return UnusableRow(type(error).__name__)


def _placeholders(column: pyarrow.Array) -> list[Any]:
    """Placeholders for a column that nothing reads: None for null, `""` and `[]`, else `FILLED`."""
    import pyarrow.compute
    import pyarrow.types as types

    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_binary(column.type):
        is_filled = pyarrow.compute.greater(pyarrow.compute.binary_length(column), 0)
    elif types.is_list(column.type) or types.is_large_list(column.type):
        is_filled = pyarrow.compute.greater(pyarrow.compute.list_value_length(column), 0)
    else:
        is_filled = column.is_valid()
    return [FILLED if filled else None for filled in is_filled.to_pylist()]
