"""Checksums of files, remembered for files that have not been touched since they were read.

What is kept (a cached model, prepared rows, a score) is known by the content it was made from, never by a time.
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

JUST_NOW = 100_000_000  # nanoseconds; clocks of file systems move in steps of up to 10 ms
MOST_DIGESTS = 500  # files whose checksum is remembered


def digest(file: Path, sync: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal; `sync` first waits until it is on the disk."""
    with open_regular(file) as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_memory() -> Path:
    """The file in which `Digests` remembers. Raises `UserError` where there is no folder for a cache."""
    return cache_dir() / "digests.json"


class Digests:
    """Checksums of files by content, remembered in the cache folder for files that have not been touched since.

    The cheap way compares a file's device, number, size, and times of modification and of change: the last of these
    moves with every write and cannot be set back by a program. With `verify` every file is read again. `read` and
    `remembered` count which way was taken.
    """

    def __init__(self, verify: bool = False):
        self.verify = verify
        self.read = self.remembered = 0

    def of(self, file: Path) -> str:
        """SHA-256 of the content of `file`, in hexadecimal."""
        with open_regular(file) as stream:
            before = os.fstat(stream.fileno())
        about = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        known = self._known()
        key = os.path.realpath(file)
        entry = known.get(key)
        if not self.verify and isinstance(entry, list) and entry[:-1] == about:
            self.remembered += 1
            return entry[-1]
        found = digest(file)
        self.read += 1
        if time.time_ns() - before.st_ctime_ns < JUST_NOW:  # another write may get the same time
            return found
        with suppress(OSError, UserError):  # a cache that cannot be written costs time alone
            memory = digest_memory()
            memory.parent.mkdir(parents=True, exist_ok=True)
            known.pop(key, None)
            recent = dict(list(known.items())[-MOST_DIGESTS:])
            write_json(memory, recent | {key: [*about, found]})
        return found

    @property
    def how(self) -> str:
        """How the checksums were found, for a report."""
        if not self.remembered:
            return f"{self.read} {'file' if self.read == 1 else 'files'} read and hashed"
        return f"{self.remembered} of {self.read + self.remembered} checksums remembered (files untouched since)"

    def _known(self) -> dict[str, Any]:
        with suppress(UserError, OSError):  # remembered checksums can be found again
            if isinstance(found := read_json(digest_memory()), dict):
                return found
        return {}


@cache
def code_digest(*parts: str) -> str:
    """16 characters that change with the source of `parts`, rooms or modules of this package such as `chat`.

    What was computed before is used again only if the code that would compute it is the same, and the libraries
    that it calls are. Comments count as code: computing once too often is the cheaper mistake.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        place = package / part
        files = place.rglob("*") if place.is_dir() else [place.with_suffix(".py")]
        for file in sorted(file for file in files if file.suffix in (".py", ".jinja")):
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    for library in ("transformers", "tokenizers", "mistral-common", "sentencepiece", "sacrebleu", "torch"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()[:16]
