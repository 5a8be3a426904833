"""Compute checksums of files, and cache them for files that have not changed.

Cached results (a model, prepared rows, a score) are identified by the content they were made from,
never by a time.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import cache_dir, open_regular, read_json, write_json

JUST_NOW = 100_000_000  # nanoseconds; the clocks of file systems advance in steps of up to 10 ms
DIGESTS = "digests.json"  # in the cache folder
MOST_DIGESTS = 500  # maximum number of cached checksums


def digest(file: Path, sync: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal. `sync` first flushes the file to the disk.

    Raises `FileNotFoundError`, or `UserError` if the file cannot be read.
    """
    with open_regular(file) as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def memory_folder() -> Path:
    """The folder for what this machine computed. Raises `UserError` if there is no home folder."""
    return cache_dir()


def remembered(name: str, shape: Any = dict[str, Any]) -> Any:
    """The dictionary in the file `name` of this machine's cache; empty if it cannot be used."""
    with suppress(OSError, UserError):
        return read_json(memory_folder() / name, shape) or {}
    return {}


def remember(name: str, key: str, value: Any, most: int) -> None:
    """Add an entry to the file `name` of this machine's cache, which keeps the `most` latest ones."""
    entries = {known: entry for known, entry in remembered(name).items() if known != key} | {key: value}
    with suppress(OSError, UserError):  # a cache that cannot be written only costs time
        file = memory_folder() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(list(entries.items())[-most:]), private=True)


class Digests:
    """Checksums of files by content, cached in the cache folder for files that have not changed.

    A file counts as unchanged if its device, inode, size, and times of modification and change
    (mtime, ctime) are the same. A write updates ctime, and a program cannot set it back, but a write
    through a memory map may update it late. With `verify` every file is read again. `read` and
    `remembered` count the files that were hashed and those whose checksum came from the cache.
    """

    def __init__(self, verify: bool = False):
        self.verify = verify
        self.read = self.remembered = 0

    def of(self, file: Path) -> str:
        """SHA-256 of the content of `file`, in hexadecimal."""
        with open_regular(file) as stream:
            before = os.fstat(stream.fileno())
        identity = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        key = os.path.realpath(file)
        entry = remembered(DIGESTS).get(key)
        if not self.verify and isinstance(entry, list) and entry[:-1] == identity:
            self.remembered += 1
            return entry[-1]
        checksum = digest(file)
        self.read += 1
        if time.time_ns() - before.st_ctime_ns < JUST_NOW:  # a later write may get the same time
            return checksum
        remember(DIGESTS, key, [*identity, checksum], MOST_DIGESTS)
        return checksum

    @property
    def how(self) -> str:
        """How many checksums were computed and how many came from the cache, for a report."""
        if not self.remembered:
            return f"{self.read} {'file' if self.read == 1 else 'files'} read and hashed"
        return f"{self.remembered} of {self.read + self.remembered} checksums remembered (files untouched since)"


@cache
def code_digest(*parts: str) -> str:
    """16 characters that identify the source code of `parts`: folders or modules of this package.

    A cached result is reused only if the code that computed it, and the versions of the libraries
    that this code calls, are unchanged. A changed comment counts as a change: an unnecessary
    recomputation is cheaper than a stale result.
    """
    package = Path(__file__).parent
    hasher = hashlib.sha256()
    for part in parts:
        path = package / part
        files = path.rglob("*") if path.is_dir() else [path.with_suffix(".py")]
        for file in sorted(file for file in files if file.suffix in (".py", ".jinja")):
            hasher.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    for library in ("transformers", "tokenizers", "mistral-common", "sentencepiece", "sacrebleu", "torch"):
        hasher.update(f"{library} {version(library)}\0".encode())
    return hasher.hexdigest()[:16]
