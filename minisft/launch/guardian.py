"""The guardian: a process that outlives a run's supervisor and ends every process of the run.

The supervisor can be killed or stopped, and so can the ranks; then none of them can end the others.
The guardian is a fork of the supervisor that only waits for two pipes to close: the supervisor's,
and that of the starter, the process that started the supervisor. It has its own session, so signals
to the run's process group do not reach it. It finds the processes to end by a mark in their
environment, whatever their parents are.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from minisft.processes import marked
from minisft.training.heartbeat import MARK, write_failure

HANDOVER = 10.0  # seconds that the supervisor has to end the run after its starter is gone


class Guardian:
    """The supervisor's handle on its guardian.

    Create it before any thread starts, since it forks; `dismiss` it when all processes of the run
    are gone.
    """

    def __init__(self, run_folder: Path, mark: str):
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writing)
            try:
                _guard(run_folder, mark, reading)
            finally:
                os._exit(0)
        os.close(reading)

    def dismiss(self) -> None:
        """Tell the guardian to exit, and wait until it has."""
        with suppress(OSError):
            os.write(self._writing, b".")
        os.close(self._writing)
        with suppress(ChildProcessError, ProcessLookupError):
            for _ in range(20):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.05)
            os.kill(self.pid, signal.SIGKILL)  # it is stopped (SIGSTOP)
            os.waitpid(self.pid, 0)


def _guard(run_folder: Path, mark: str, supervisor_pipe: int) -> None:
    supervisor = os.getppid()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):  # otherwise the reader of the supervisor's output would wait for the guardian
        os.dup2(null, output)
    ends = select.poll()
    ends.register(supervisor_pipe, select.POLLIN)
    ends.register(0, 0)  # the starter's pipe: watch only for its closing, the supervisor reads from it
    ready = dict(ends.poll())
    if supervisor_pipe not in ready:  # the starter is gone: unless stopped, the supervisor ends the run
        ends.unregister(0)
        ready = dict(ends.poll(HANDOVER * 1000))
    if supervisor_pipe not in ready:
        os.kill(supervisor, signal.SIGKILL)  # it still holds the pipe open, so the pid has not been reused
    elif os.read(supervisor_pipe, 1):  # a byte means `dismiss`; a closed pipe, a dead supervisor
        return
    end_marked(mark)
    if not (run_folder / "DONE").exists():
        write_failure(run_folder, {"rank": None, "step": None, "reason": "the supervisor was killed"})


def end_marked(mark: str) -> None:
    """Kill every process of this machine with this `mark`, and those they start meanwhile."""
    for _ in range(20):
        if not (run_processes := marked(MARK, mark)):
            return
        for process in run_processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(run_processes, timeout=0.5)
