"""Give memory that is free back to the system: on a CPU, what a step no longer needs stays with the process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_free_memory() -> None:
    """Return the heap's free pages to the system; nothing happens where the C library is not glibc.

    Gradients and activations come and go in sizes that glibc keeps in its heap, and what lives longer (the
    optimizer's states) is allocated above them: without this a step finds its memory in pieces and takes more.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
