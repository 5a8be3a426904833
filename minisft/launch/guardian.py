"""The process that outlives a run's supervisor by a moment, and ends every process of the run when it is gone.

A supervisor can be killed or stopped, and so can the ranks: then none of them can end the others. The guardian is a
fork of the supervisor that only waits for the end of two pipes, the supervisor's and the starter's. No signal to the
run's process group reaches it, and it finds what to end by a mark in the environment, whoever the parent is.
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

HANDOVER = 10.0  # seconds that the supervisor has to end everything after its starter is gone


class Guardian:
    """The supervisor's side: made before any thread is started; `dismiss` it when every process of the run is gone."""

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
        """Let the guardian go, and wait until it is gone."""
        with suppress(OSError):
            os.write(self._writing, b".")
        os.close(self._writing)
        with suppress(ChildProcessError, ProcessLookupError):
            for _ in range(20):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.05)
            os.kill(self.pid, signal.SIGKILL)  # it is stopped
            os.waitpid(self.pid, 0)


def _guard(run_folder: Path, mark: str, supervisor_pipe: int) -> None:
    supervisor = os.getppid()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):  # else whoever reads the supervisor's output would wait for the guardian, too
        os.dup2(null, output)
    ends = select.poll()
    ends.register(supervisor_pipe, select.POLLIN)
    ends.register(0, 0)  # the starter's: only its end counts, what it says is the supervisor's to read
    ready = dict(ends.poll())
    if supervisor_pipe not in ready:  # the starter is gone, which the supervisor, unless it is stopped, sees to
        ends.unregister(0)
        ready = dict(ends.poll(HANDOVER * 1000))
    if supervisor_pipe not in ready:
        os.kill(supervisor, signal.SIGKILL)  # it holds the pipe open, so the number is still its own
    elif os.read(supervisor_pipe, 1):
        return
    end_marked(mark)
    if not (run_folder / "DONE").exists():
        write_failure(run_folder, {"rank": None, "step": None, "reason": "the supervisor was killed"})


def end_marked(mark: str) -> None:
    """Kill every process of this machine that carries `mark`, and those that they start meanwhile."""
    for _ in range(20):
        if not (found := marked(MARK, mark)):
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)
