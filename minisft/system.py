"""What this process may use of the machine: in a container or a batch job that is a share, not the whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
