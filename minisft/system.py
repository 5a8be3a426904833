"""This machine: its cores and memory (in a container or batch job only a share of them), and its names."""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """CPU cores: of those that the process is bound to, as many as its control groups' quota is worth; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")  # microseconds in each period, or "max"
        if quota.isdigit() and period.isdigit():
            usable = min(usable, int(quota) // int(period))
    return max(1, usable)


def memory() -> tuple[int, int]:
    """Bytes of main memory in all and still free, page cache counted as free; within the control groups' limits."""
    import psutil

    whole = psutil.virtual_memory()
    total, free = whole.total, whole.available
    for group in _control_groups():
        limit = _read(group / "memory.max")  # bytes, or "max"
        if limit.isdigit():
            used = int(_read(group / "memory.current") or 0)
            cached = dict(line.split() for line in _read(group / "memory.stat").splitlines()).get("inactive_file", 0)
            total, free = min(total, int(limit)), min(free, max(0, int(limit) - used + int(cached)))
    return total, free


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control group (version 2) and of those it is in: each may set a limit."""
    lines = _read(Path("/proc/self/cgroup")).splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    folder = Path(os.path.normpath(CONTROL_GROUPS / own.strip("/")))
    if not folder.is_relative_to(CONTROL_GROUPS):  # it lies outside of what a container sees
        folder = CONTROL_GROUPS
    yield from (group for group in (folder, *folder.parents) if group.is_relative_to(CONTROL_GROUPS))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()  # a group's name is any bytes
    except OSError:
        return ""


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


def is_here(name: str) -> bool:
    """Whether a host is the machine that asks: by a loopback address, `localhost`, or its own name."""
    return is_loopback(name) or name == socket.gethostname()


def is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
