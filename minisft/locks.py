"""File locks: one process at a time prepares, trains or evaluates a run, or fills the cache."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from minisft.files import open_own


def open_lock(file: Path) -> TextIO:
    """Open the lock file `file`, without locking or changing it. Raises `UserError` for a link."""
    handle = open_own(file, os.O_RDWR, private=True)
    return os.fdopen(handle, "r+", encoding="utf-8")


@contextmanager
def locked_folder(folder: Path) -> Iterator[int | Literal[False] | None]:
    """Lock `folder` itself, however its path is spelled.

    Yields the locked descriptor, False if another process holds the lock, or None if the folder
    cannot be opened.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def try_lock(lock: TextIO, how: int = fcntl.LOCK_EX) -> bool:
    """Try to lock an open file; False if another process holds the lock.

    Returns True on a file system without locks.
    """
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True
