"""Child processes: they import no module of the current folder, and end with the process that started them.

`python -m` and `python -c` look for modules in the current folder first; a `torch.py` beside somebody's data would
run. Every Python that this package starts gets `-P`, and `PYTHONSAFEPATH` for those that it starts in turn.
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
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between a fork and its program


def python(*words: str) -> list[str]:
    """The beginning of a command that runs this very Python."""
    return [sys.executable, "-P", *words]


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of `base` for a child process: modules come from nowhere but installed packages and full paths."""
    found = dict(base) | SAFE_PATH
    if "PYTHONPATH" in found:  # an empty or relative entry means the current folder
        kept = [entry for entry in found["PYTHONPATH"].split(os.pathsep) if Path(entry).is_absolute()]
        found["PYTHONPATH"] = os.pathsep.join(kept)
    return found


def end_with_parent() -> None:
    """In a new process, before its program starts: be killed when the parent is gone (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    words: Sequence[str], more: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with the variables `more` beside the inherited ones; its output is captured.

    Whatever ends this process or this call, the command and all that it has started in its process group end as well.
    Raises `subprocess.TimeoutExpired` after `timeout` seconds.
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
    """Whether the process of that number is alive, and not a zombie that nobody has waited for.

    With `began`, its start in seconds since 1970, a younger process that has got the same number does not count.
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
    """When the process of that number started, in seconds since 1970; None if there is none."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def marked(name: str, value: str) -> list[psutil.Process]:
    """The living processes of this machine in whose environment the variable `name` has this value, but this one."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_marked = process.pid != os.getpid() and process.environ().get(name) == value
            if is_marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def open_standard_streams() -> None:
    """Open the null device in the place of each standard stream that is closed.

    Else the next file that is opened, a lock or a log, would get its number, and what is printed would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False, encoding="utf-8"))  # noqa: SIM115
