"""Start child processes that import nothing from the current folder and end with their parent.

`python -m` and `python -c` search the current folder for modules first, so a `torch.py` beside
somebody's data would run. Every Python that this package starts gets `-P`, and `PYTHONSAFEPATH` for
its own child processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: unsafe between fork and exec


def python(*words: str) -> list[str]:
    """A command that runs this Python interpreter with the arguments `words`."""
    return [sys.executable, "-P", *words]


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of `base` for a child process, without relative import paths."""
    variables = dict(base) | SAFE_PATH
    if "PYTHONPATH" in variables:  # an empty or relative entry means the current folder
        absolute = [entry for entry in variables["PYTHONPATH"].split(os.pathsep) if Path(entry).is_absolute()]
        variables["PYTHONPATH"] = os.pathsep.join(absolute)
    return variables


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux). For `preexec_fn`."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    words: Sequence[str], more: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. `more` adds variables to the inherited environment.

    If this call fails or is interrupted, the command and its process group are killed; if this
    process is killed, the command is too. Raises `subprocess.TimeoutExpired` after `timeout`
    seconds.
    """
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment() | dict(more or {}),
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return subprocess.CompletedProcess(words, child.returncode, out, err)


def lives(pid: int, began: float | None = None) -> bool:
    """Whether the process `pid` is alive and not a zombie.

    `began` is its start time in seconds since 1970; with it, a later process that reuses the same
    number does not count.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return began is None or abs(process.create_time() - began) < 1.0
    except psutil.NoSuchProcess:
        return False


def start_of(pid: int) -> float | None:
    """The start time of the process `pid` in seconds since 1970; None if it does not exist."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def marked(name: str, value: str) -> list[psutil.Process]:
    """The other live processes on this machine whose environment variable `name` has this value."""
    import psutil

    alive = (p for p in psutil.process_iter(["environ", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    return [p for p in alive if p.pid != os.getpid() and (p.info["environ"] or {}).get(name) == value]


def open_standard_streams() -> None:
    """Replace each closed standard stream with the null device.

    Otherwise the next file to be opened, such as a lock or a log, would get its descriptor, and
    printed text would be written to that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is `number`
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False, encoding="utf-8"))  # noqa: SIM115
