"""Find the data files of a folder, open them, and unpack compressed ones.

A folder may come from somebody else: only regular files are opened, and the state files that
`save_to_disk` writes may name only files in their own folder.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Buffer, TypedDict

from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.files import read_json
from minisft.text import one_line

ENDINGS = tuple(
    kind + packed for kind in (".json", ".jsonl", ".ndjson", ".parquet", ".arrow") for packed in ("", ".gz", ".zst")
)
# Prefixes of file names that describe a data set and hold no rows.
DESCRIPTIONS = ("dataset_info", "state.json", "dataset_dict.json")
NAMED = 3  # how many skipped files the note lists by name
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BUFFER = 1 << 18  # bytes
_PIECE = 1 << 13  # bytes unpacked at a time; damage loses at most this much good data
# Unpacked bytes allowed for any file, and per compressed byte. More is a decompression bomb.
_LEAST, _RATIO = 1 << 28, 100


@dataclass(frozen=True)
class DataFile:
    """One file of rows. `name` is safe to print, and the names of its rows begin with it."""

    path: Path
    name: str


class _File(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_File]


class _Splits(TypedDict):
    splits: list[str]


def files_of(path: Path, ledger: Ledger) -> list[DataFile]:
    """Return the file itself, or the data files of a folder and its subfolders, sorted by path.

    Hidden files, files of other types and links to folders are skipped, with a note in `ledger`. In
    a folder written by `save_to_disk`, the state files determine which files are read. Raises
    `UserError` if the folder has no data file, or if a part of it cannot be read.
    """
    try:
        if not path.is_dir():
            return [DataFile(path, one_line(path.name))]
        if any((path / name).is_file() for name in DESCRIPTIONS[1:]):
            return _saved_files(path, ledger)
        all_files = sorted(_everything_in(path))
        data_files = [file for file in all_files if _is_data(file, path)]
    except OSError as error:
        where = path if error.filename is None else error.filename
        raise UserError(f"data folder {one_line(where)} cannot be read ({error.strerror}): check the path") from error
    if not data_files:
        raise UserError(f"folder {path} has no .json, .jsonl or .parquet file: give a file of conversations")
    skipped = sorted(set(all_files) - set(data_files))
    if skipped:
        names = ", ".join(one_line(file.relative_to(path), 60) for file in skipped[:NAMED])
        more = ", …" if len(skipped) > NAMED else ""
        ledger.note(f"files in the folder that were not read: {len(skipped):,} ({names}{more})")
    return [DataFile(file, one_line(file.name)) for file in data_files]


def _everything_in(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, and links to other folders, which are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(parent) / name for name in files)
        yield from (link for name in folders if (link := Path(parent) / name).is_symlink())


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_named = file.name.lower().endswith(ENDINGS) and not file.name.startswith(DESCRIPTIONS)
    return is_named and not is_hidden and file.is_file()


def _saved_files(folder: Path, ledger: Ledger) -> list[DataFile]:
    """The files of a saved `Dataset` or `DatasetDict`.

    `state.json` lists the files of a `Dataset` in order; a `DatasetDict` has a folder for each
    split. All splits are read, with a note in `ledger`.
    """
    try:
        splits = read_json(folder / "dataset_dict.json", _Splits) or {"splits": [""]}
        files = []
        for split in splits["splits"]:
            split_folder = folder / _plain_name(split) if split else folder
            state = read_json(split_folder / "state.json", _State)
            if state is None:
                raise UserError(f"{split_folder} has no state.json")
            for entry in state["_data_files"]:
                name = _plain_name(entry["filename"])
                files.append(DataFile(split_folder / name, one_line(f"{split} {name}")))
    except UserError as error:
        raise UserError(f"{folder} is incomplete ({error}): save the data set with save_to_disk again") from error
    if len(names := splits["splits"]) > 1:
        shown = ", ".join(one_line(name, 60) for name in names[:NAMED]) + (", …" if len(names) > NAMED else "")
        ledger.note(f"all splits of the saved data set are read ({shown}): give the folder of one to read only that")
    return files


def _plain_name(name: str) -> str:
    """Return `name` if it is a plain name without a path. Raises `UserError` for any other."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UserError(f"it names {one_line(name, 60)!r}, which is not a file of that folder")
    return name


# --- opening -----------------------------------------------------------------------------------------------


def open_data(file: DataFile, ledger: Ledger) -> io.BufferedReader:
    """Open a regular file for reading bytes, unpacked if it is gzip or zstd.

    Damaged compressed data ends where the damage begins, and `ledger` records the loss. Raises
    `UserError` if the file is missing, empty, unreadable or not a regular file.
    """
    try:
        handle = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never block on a pipe
    except FileNotFoundError:
        raise UserError(f"data file {file.path} does not exist: check the path, or use --data sharegpt") from None
    except OSError as error:
        raise UserError(f"data file {file.path} cannot be read ({error.strerror}): check its permissions") from error
    plain = _Plain(handle, file)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        plain.close()
        raise UserError(
            f"data file {file.path} is a pipe, a device or a folder: give a regular file, because it is read twice"
        )
    if status.st_size == 0:
        plain.close()
        raise UserError(f"data file {file.path} is empty: fetch or export it again")
    stream: io.BufferedReader = io.BufferedReader(plain, _BUFFER)
    head = stream.peek(4)
    # The first bytes decide, because names are often wrong.
    codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
    return stream if codec is None else io.BufferedReader(_Unpacked(stream, codec, file, ledger), _BUFFER)


class _Plain(io.FileIO):
    """A file whose read errors (a failing disk, for example) become `UserError`."""

    def __init__(self, handle: int, file: DataFile):
        super().__init__(handle, "rb")
        self._file = file

    def readinto(self, buffer: Buffer) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise UserError(f"data file {self._file.path} cannot be read ({error.strerror}): copy it again") from error


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, unpacked in small pieces and limited in total size."""

    def __init__(self, packed: io.BufferedReader, codec: str, file: DataFile, ledger: Ledger):
        self._packed, self._codec, self._file, self._ledger = packed, codec, file, ledger
        self._read = 0
        self._ended = False  # after an error a stream may return its undecoded buffer
        self._most = max(_LEAST, _RATIO * os.fstat(packed.fileno()).st_size)
        if codec == "gzip":
            self._stream = gzip.GzipFile(fileobj=packed)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(packed, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)
        if self._ended:
            return 0
        if self._read > self._most:
            self._ended = True
            self._ledger.lose(f"{self._file.name} unpacks to more than {self._most:,} bytes; the rest was not read")
            return 0
        try:
            data = self._stream.read(min(len(target), _PIECE))
        except (OSError, EOFError, zlib.error):
            self._ended = True
            if not self._read:
                raise UserError(f"data file {self._file.path} is damaged {self._codec}: fetch it again") from None
            self._ledger.lose(f"{self._file.name} is cut off or damaged {self._codec} after {self._read:,} bytes")
            return 0
        target[: len(data)] = data
        self._read += len(data)
        return len(data)

    def close(self) -> None:
        self._packed.close()
        super().close()
