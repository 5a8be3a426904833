"""The files that data is in: which ones of a folder are read, and how one is opened, and unpacked if it is compressed.

A folder may come from somebody else: only regular files are opened, and `save_to_disk` may name only files in it.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from minisft.data.ledger import Ledger
from minisft.errors import UserError
from minisft.files import read_json
from minisft.text import one_line

ENDINGS = tuple(
    kind + packed for kind in (".json", ".jsonl", ".ndjson", ".parquet", ".arrow") for packed in ("", ".gz", ".zst")
)
DESCRIPTIONS = ("dataset_info", "state.json", "dataset_dict.json")  # beginnings of names: not data, but about it
NAMED = 3  # files that a note names
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BUFFER = 1 << 18  # bytes
_PIECE = 1 << 13  # bytes that are unpacked at a time; damage costs no more
_LEAST, _RATIO = 1 << 28, 100  # bytes that may come of any compressed file, or of each of its bytes; more is a bomb


@dataclass(frozen=True)
class DataFile:
    """One file of rows; `name`, which is fit to be shown, is how its rows are named."""

    path: Path
    name: str


class _File(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_File]


class _Splits(TypedDict):
    splits: list[str]


def files_of(path: Path, ledger: Ledger) -> list[DataFile]:
    """The file itself, or the files of a folder in the order of their names. Raises `UserError` if there are none.

    Hidden files and other kinds are left out, with a note. A folder of `save_to_disk` names its files itself.
    """
    try:
        if not path.is_dir():
            return [DataFile(path, one_line(path.name))]
        if any((path / name).is_file() for name in DESCRIPTIONS[1:]):
            return _saved(path)
        found = sorted(file for file in path.rglob("*") if not file.is_dir())
        chosen = [file for file in found if _is_data(file, path)]
    except OSError as error:
        raise UserError(f"data folder {path} cannot be read ({error.strerror}): check the path") from error
    if not chosen:
        raise UserError(f"folder {path} has no .json, .jsonl or .parquet file: give a file of conversations")
    left = sorted(set(found) - set(chosen))
    if left:
        names = ", ".join(one_line(file.relative_to(path), 60) for file in left[:NAMED])
        ledger.note(f"files of the folder that were not read: {len(left):,} ({names}{', …' * (len(left) > NAMED)})")
    return [DataFile(file, one_line(file.name)) for file in chosen]


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_named = file.name.lower().endswith(ENDINGS) and not file.name.startswith(DESCRIPTIONS)
    return is_named and not is_hidden and file.is_file()


def _saved(folder: Path) -> list[DataFile]:
    """The files of a `Dataset` (state.json names them in order) or of a `DatasetDict` (a folder for each split)."""
    try:
        splits = read_json(folder / "dataset_dict.json", _Splits) or {"splits": [""]}
        files = []
        for split in splits["splits"]:
            place = folder / _plain(split) if split else folder
            state = read_json(place / "state.json", _State)
            if state is None:
                raise UserError(f"{place} has no state.json")
            for entry in state["_data_files"]:
                name = _plain(entry["filename"])
                files.append(DataFile(place / name, one_line(f"{split} {name}")))
    except UserError as error:
        raise UserError(f"{folder} is not whole ({error}): save the data set with save_to_disk again") from error
    return files


def _plain(name: str) -> str:
    """The name of something in the folder itself. Raises `UserError` for a path that leads elsewhere."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UserError(f"it names {one_line(name, 60)!r}, which is not a file of its own")
    return name


# --- opening -----------------------------------------------------------------------------------------------


def open_data(file: DataFile, ledger: Ledger) -> io.BufferedReader:
    """A regular file as bytes, unpacked if it is compressed. Raises `UserError` if it is missing, empty, or no file.

    Compressed data that is damaged ends at the damage, which the ledger then says.
    """
    try:
        handle = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not keep us waiting
    except FileNotFoundError:
        raise UserError(f"data file {file.path} does not exist: check the path, or use --data sharegpt") from None
    except OSError as error:
        raise UserError(f"data file {file.path} cannot be read ({error.strerror}): check its permissions") from error
    plain = _Plain(handle, file)
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        plain.close()
        raise UserError(f"data file {file.path} is a pipe, a device or a folder: give a regular file, it is read twice")
    if about.st_size == 0:
        plain.close()
        raise UserError(f"data file {file.path} is empty: fetch or export it again")
    stream = io.BufferedReader(plain, _BUFFER)
    head = stream.peek(4)
    codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
    return stream if codec is None else io.BufferedReader(_Unpacked(stream, codec, file, ledger), _BUFFER)


class _Plain(io.FileIO):
    """A file on a disk that may fail."""

    def __init__(self, handle: int, file: DataFile):
        super().__init__(handle, "rb")
        self._file = file

    def readinto(self, buffer: bytearray) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise UserError(f"data file {self._file.path} cannot be read ({error.strerror}): copy it again") from error


class _Unpacked(io.RawIOBase):
    """What is in a compressed file, in pieces of bounded size."""

    def __init__(self, packed: io.BufferedReader, codec: str, file: DataFile, ledger: Ledger):
        self._packed, self._codec, self._file, self._ledger = packed, codec, file, ledger
        self._read = 0
        self._most = max(_LEAST, _RATIO * os.fstat(packed.fileno()).st_size)
        if codec == "gzip":
            self._stream = gzip.GzipFile(fileobj=packed)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(packed, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        if self._read > self._most:
            self._ledger.lose(f"{self._file.name} unpacks to more than {self._most:,} bytes; the rest was not read")
            return 0
        try:
            data = self._stream.read(min(len(buffer), _PIECE))
        except (OSError, EOFError, zlib.error):
            if not self._read:
                raise UserError(f"data file {self._file.path} is damaged {self._codec}: fetch it again") from None
            self._ledger.lose(f"{self._file.name} is cut off or damaged {self._codec} after {self._read:,} bytes")
            return 0
        buffer[: len(data)] = data
        self._read += len(data)
        return len(data)

    def close(self) -> None:
        self._packed.close()
        super().close()
