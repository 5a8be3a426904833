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
MOST_DIGESTS = 500  # maximum number of cached checksums


def digest(file: Path, sync: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal. `sync` first flushes the file to the disk.

    Raises `FileNotFoundError`, or `UserError` if the file cannot be read.
    """
    with open_regular(file) as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_memory() -> Path:
    """The cache file of `Digests`. Raises `UserError` if there is no folder for a cache."""
    return cache_dir() / "digests.json"


class Digests:
    """Checksums of files by content, cached in the cache folder for files that have not changed.

    A file counts as unchanged if its device, inode, size, and times of modification and change
    (mtime, ctime) are the same. Every write updates ctime, and a program cannot set it back. With
    `verify` every file is read again. `read` and `remembered` count the files that were hashed and
    those whose checksum came from the cache.
    """

    def __init__(self, verify: bool = False):
        self.verify = verify
        self.read = self.remembered = 0

    def of(self, file: Path) -> str:
        """SHA-256 of the content of `file`, in hexadecimal."""
        with open_regular(file) as stream:
            before = os.fstat(stream.fileno())
        identity = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        known = self._known()
        key = os.path.realpath(file)
        entry = known.get(key)
        if not self.verify and isinstance(entry, list) and entry[:-1] == identity:
            self.remembered += 1
            return entry[-1]
        checksum = digest(file)
        self.read += 1
        if time.time_ns() - before.st_ctime_ns < JUST_NOW:  # a later write may get the same time
            return checksum
        with suppress(OSError, UserError):  # without the cache the next call only takes longer
            memory = digest_memory()
            memory.parent.mkdir(parents=True, exist_ok=True)
            known.pop(key, None)
            recent = dict(list(known.items())[-MOST_DIGESTS:])
            write_json(memory, recent | {key: [*identity, checksum]})
        return checksum

    @property
    def how(self) -> str:
        """How many checksums were computed and how many came from the cache, for a report."""
        if not self.remembered:
            return f"{self.read} {'file' if self.read == 1 else 'files'} read and hashed"
        return f"{self.remembered} of {self.read + self.remembered} checksums remembered (files untouched since)"

    def _known(self) -> dict[str, Any]:
        with suppress(UserError, OSError):  # a damaged cache counts as empty
            if isinstance(entries := read_json(digest_memory()), dict):
                return entries
        return {}


@cache
def code_digest(*parts: str) -> str:
    """16 characters that identify the source code of `parts`: folders or modules of this package.

    A cached result is reused only if the code that computed it, and the versions of the libraries
    that this code calls, are unchanged. A changed comment counts as a change: an unnecessary
    recomputation is cheaper than a stale result.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        path = package / part
        files = path.rglob("*") if path.is_dir() else [path.with_suffix(".py")]
        for file in sorted(file for file in files if file.suffix in (".py", ".jinja")):
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    for library in ("transformers", "tokenizers", "mistral-common", "sentencepiece", "sacrebleu", "torch"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()[:16]
