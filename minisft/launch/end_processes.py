"""Ends a run's launchers and everything that they started, and removes what they leave."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from minisft.processes import lives

POLITE = 2.0  # seconds between asking a process to end and killing it
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make descendants of this process its own children when their parents die (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_all(launchers: Sequence[subprocess.Popen], spared: int = 0) -> None:
    """End the launchers and all descendants of this process except the pid `spared`.

    Everything is asked to end (SIGTERM) and killed (SIGKILL) if it has not ended soon. Returns
    after some seconds even if a process is left: not even SIGKILL ends one that waits for a dead
    disk.
    """
    me = psutil.Process()

    def descendants() -> list[psutil.Process]:
        children = [child for child in me.children(recursive=True) if child.pid != spared]
        return [child for child in children if lives(child.pid)]

    for launcher in launchers:
        if launcher.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
    until = time.monotonic() + POLITE
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=max(0.0, until - time.monotonic()))
    began = time.monotonic()
    while remaining := descendants():
        for child in remaining:
            with suppress(psutil.NoSuchProcess):
                child.terminate() if time.monotonic() - began < POLITE / 4 else child.kill()
        psutil.wait_procs(remaining, timeout=0.2)
        if time.monotonic() - began > 2 * POLITE:
            break
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=1)
    for child in me.children():
        with suppress(psutil.Error):
            if child.pid != spared:
                child.wait(timeout=0)  # adopted and dead: collect its exit status


def remove_shared_memory(command: Sequence[str]) -> None:
    """Remove the shared-memory buffers of DeepSpeed's CPU ranks, as far as `command` left any.

    A buffer keeps its name until all ranks have opened it, so ranks that are killed early leave it
    behind.
    """
    if "--master_port" in command:
        port = command[command.index("--master_port") + 1]
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
            with suppress(OSError):
                file.unlink()
