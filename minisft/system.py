"""Query this machine: its host names, and its cores and memory within control group limits."""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """The number of usable CPU cores, at least 1: the affinity mask, limited by CPU quotas."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")  # microseconds in each period, or "max"
        if quota.isdigit() and period.isdigit():
            usable = min(usable, int(quota) // int(period))
    return max(1, usable)


def memory() -> tuple[int, int]:
    """Total and free bytes of main memory, within the limits of the control groups.

    Page cache counts as free.
    """
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
    """The folders of this process's control group (v2) and its ancestors: each may set a limit."""
    lines = _read(Path("/proc/self/cgroup")).splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    folder = Path(os.path.normpath(CONTROL_GROUPS / own.strip("/")))
    if not folder.is_relative_to(CONTROL_GROUPS):  # the group is outside the part that a container sees
        folder = CONTROL_GROUPS
    yield from (group for group in (folder, *folder.parents) if group.is_relative_to(CONTROL_GROUPS))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()  # a group's name is any bytes
    except OSError:
        return ""


def release_free_memory() -> None:
    """Return the free pages of the heap to the system. Does nothing if the C library is not glibc.

    glibc keeps freed blocks of the sizes that gradients and activations have in its heap, and
    longer-lived blocks (the optimizer states) are allocated above them. Without this call a step
    finds fragmented memory and allocates more.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def skip_accelerator_search() -> None:
    """Keep DeepSpeed, when it is imported, from probing for accelerators where there is no GPU, and warning of it."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Let a library's `logger` say nothing inside this context: what it reports is raised as well."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def is_here(name: str) -> bool:
    """Whether `name` means this machine: a loopback address, `localhost`, or its own host name."""
    return is_loopback(name) or name == socket.gethostname()


def is_loopback(name: str) -> bool:
    """Whether `name` is `localhost` or a loopback IP address."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
