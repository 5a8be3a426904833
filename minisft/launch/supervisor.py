"""The supervisor: the process between a notebook and a run's ranks, which leaves no process behind.

    python -m minisft.launch.supervisor RUN_FOLDER < task

`minisft.launch.launch_run` starts it in a session of its own, and writes a `Task` in JSON as the
first line of its standard input; the argument only helps people who look at process lists. The
supervisor starts the task's commands and watches the ranks (`minisft.training.heartbeat`). It ends
everything when the commands end, when all ranks are done but a command does not end, when a rank
hangs or dies, when a line arrives on its standard input or the input closes, or when its parent is
gone.

On Linux, processes whose parents die become the supervisor's own children, so none escapes. If the
supervisor itself is killed, the ranks notice and end, and its guardian (`minisft.launch.guardian`)
kills those that do not.

The launchers' output goes to a log. `FAILED` is written last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TextIO

from minisft import processes
from minisft.errors import UserError
from minisft.files import open_own, parse_json, write_json
from minisft.launch.commands import Command
from minisft.launch.end_processes import adopt_orphans, end_all, remove_shared_memory
from minisft.launch.failure_reasons import (
    LAUNCHER_LOG,
    explain_taken_port,
    failure_record,
    host_reason,
    is_explained,
    killed_reason,
    logged_error,
    reported_failure,
)
from minisft.launch.guardian import Guardian
from minisft.processes import lives
from minisft.system import is_here
from minisft.text import one_line
from minisft.training.heartbeat import (
    BEAT,
    GUARDIAN,
    MARK,
    SUPERVISOR,
    RankStatus,
    SupervisorStatus,
    Watch,
    read_heartbeats,
    write_failure,
)

LOOK = 0.25  # seconds between two checks of the launchers
GRACE = 5.0  # seconds that a launcher has to notice the end of its ranks, or the death of one
GONE = "the process that started it is gone"


@dataclass(frozen=True)
class Task:
    """What to run: `commands`, in `working_directory`, start `ranks` ranks that write to `folder`.

    The run is ended if a rank gives no sign of life for `heartbeat_timeout` seconds, or if no rank
    makes progress for `progress_timeout` seconds. `mark` is in the environment of every process of
    the run.
    """

    folder: str
    commands: list[Command]
    working_directory: str
    ranks: int
    heartbeat_timeout: float
    progress_timeout: float
    mark: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return parse_json(text, Path("the task"), cls)


def main() -> None:
    """Run the task on the first line of standard input; exit with 0 for success, else with 1."""
    task_json, more = _first_line(0)
    supervisor = Supervisor(Task.from_json(task_json))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: supervisor.stop(f"stopped by {signal.Signals(number).name}"))
    if more:
        supervisor.stop(more.strip())
    sys.exit(supervisor.run())


def _first_line(number: int) -> tuple[str, str]:
    """Read the first line of a file descriptor; return it and whatever was read with it.

    It bypasses Python's buffer: `select` would not see what that holds.
    """
    received = b""
    while b"\n" not in received and (data := os.read(number, 1 << 16)):
        received += data
    line, _, more = received.partition(b"\n")
    return line.decode(), more.decode(errors="replace")


class Supervisor:
    """Runs one task to its end; the module docstring says how."""

    def __init__(self, task: Task):
        self.task, self.folder = task, Path(task.folder)
        self.watch = Watch()
        self.reason = ""  # why the run is being ended early
        self.blamed: RankStatus | None = None  # the rank that the reason is about
        self.exits: dict[int, int] = {}  # rank by file descriptor; it becomes readable when the process ends
        self.watched: set[int] = set()  # ranks that have had such a descriptor
        self.over = False  # all ranks are done, or the run has failed and a rank has given the reason
        self.dead: list[RankStatus] = []  # ranks that ended without reporting it, in the order of their ends
        self.dead_since = self.failed_at = self.done_since = 0.0

    def stop(self, reason: str, blamed: RankStatus | None = None) -> None:
        """End the run soon; only the first reason given counts."""
        if not self.reason:
            self.reason, self.blamed = reason, blamed

    def run(self) -> int:
        """Return 0 if the commands, all ranks and `DONE` report success, else 1 (see `FAILED`)."""
        adopt_orphans()
        parent = os.getppid()
        mark = self.task.mark or secrets.token_hex(8)
        guardian = Guardian(self.folder, mark)  # before any thread is started
        environment = processes.environment()
        environment |= {MARK: mark, GUARDIAN: str(guardian.pid), "PYTHONUNBUFFERED": "1"}
        try:
            log = self._open_log()
            own_status = SupervisorStatus(self.folder)
        except (UserError, OSError) as error:
            write_failure(self.folder, failure_record(None, f"{self.folder.name} cannot be started: {one_line(error)}"))
            guardian.dismiss()
            return 1
        launchers = self._start_launchers(environment | {SUPERVISOR: own_status.name}, log)
        self._watch_until_over(launchers, own_status, parent)
        if not self.reason:
            self._look_at_ranks()
        own_status.remove()  # ranks on other hosts end when it disappears
        failed = next((one.returncode for one in launchers if one.returncode), 0)
        end_all(launchers, guardian.pid)
        code = self._verdict(failed)
        for command in self.task.commands:
            remove_shared_memory(command.words)
        guardian.dismiss()
        return code

    def _start_launchers(self, environment: dict[str, str], log: FileIO) -> list[subprocess.Popen]:
        return [
            subprocess.Popen(
                command.words,
                cwd=self.task.working_directory,
                env={k: v for k, v in environment.items() if k not in command.withheld} | command.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=processes.end_with_parent,  # safe, since no thread has been started yet
            )
            for command in self.task.commands
        ]

    def _watch_until_over(
        self, launchers: Sequence[subprocess.Popen], own_status: SupervisorStatus, parent: int
    ) -> None:
        """Return when all launchers have ended, or when the run has to be ended."""
        looked = beaten = 0.0
        interval = max(0.5, self.task.ranks / 100)  # each look reads one file per rank
        while any(one.poll() is None for one in launchers) and not (self.reason or self.over):
            self._listen(LOOK)
            now = time.monotonic()
            if now - beaten > BEAT:
                own_status.beat()
                beaten = now
                if os.getppid() != parent:
                    self.stop(GONE)
            if now - looked > interval:
                self._look_at_ranks()
                self._look_at_launchers(launchers)
                looked = now

    def _open_log(self) -> FileIO:
        """Open a new log; an earlier log, which may have a hard link elsewhere, is not changed."""
        file = self.folder / LAUNCHER_LOG
        file.unlink(missing_ok=True)
        return FileIO(open_own(file, os.O_WRONLY | os.O_APPEND | os.O_EXCL, private=True), "w")

    def _look_at_launchers(self, launchers: Sequence[subprocess.Popen]) -> None:
        """Fail the run if one host's launcher has failed: other hosts would wait for its ranks."""
        for launcher, command in zip(launchers, self.task.commands, strict=True):
            if launcher.poll():
                self.failed_at = self.failed_at or time.monotonic()
                if time.monotonic() - self.failed_at < GRACE or len(launchers) == 1:
                    continue
                self.over = True
                if not is_explained(self.folder):
                    reason = host_reason(self.folder, command.host, launcher.returncode)
                    self.stop(reason, self.dead[0] if self.dead else None)

    def _listen(self, seconds: float) -> None:
        """Wait; stop the run if the parent sends a line or closes standard input.

        The end of a rank wakes it as well: the first rank to end is the reason, and its launcher
        soon ends the others.
        """
        sources: list[TextIO | int] = [sys.stdin, *self.exits]
        for source in select.select(sources, [], [], seconds)[0]:
            if isinstance(source, int):
                os.close(source)
                self._look_at_exit(self.exits.pop(source))
            else:
                line = sys.stdin.readline()
                self.stop(line.strip() or GONE)

    def _look_at_exit(self, rank: int) -> None:
        # Read its status again: it may have reported `done` after the last look and before its end.
        status = next((status for status in read_heartbeats(self.folder) if status.rank == rank), None)
        if status is not None and not status.ended and rank not in {other.rank for other in self.dead}:
            self.dead.append(status)
            self.dead_since = self.dead_since or time.monotonic()

    def _watch_exit(self, status: RankStatus) -> None:
        """Let the end of a rank of this machine wake `_listen`, if the system can (Linux)."""
        if status.rank not in self.watched and hasattr(os, "pidfd_open"):
            self.watched.add(status.rank)
            with suppress(OSError):
                self.exits[os.pidfd_open(status.pid)] = status.rank

    def _look_at_ranks(self) -> None:
        """Stop the run if a rank is dead or silent, or if no rank makes progress."""
        statuses = read_heartbeats(self.folder)
        for status in statuses:
            if status.ended:
                continue
            here = is_here(status.host)
            if here:
                self._watch_exit(status)
            if here and not lives(status.pid):
                self._look_at_exit(status.rank)
            elif (silent := self.watch.unchanged(("life", status.rank), status.changed)) > self.task.heartbeat_timeout:
                self.stop(f"no sign of life for {silent:.0f} s ({status}): it hangs or was stopped", status)
        if self._all_done(statuses):
            self.done_since = self.done_since or time.monotonic()
            self.over = self.over or time.monotonic() - self.done_since > GRACE
            return
        if self.dead and time.monotonic() - self.dead_since > GRACE:
            if is_explained(self.folder):  # its launcher ended it because another rank failed
                self.over = True
            else:
                self.stop(killed_reason(self.folder, self.dead[0]), self.dead[0])
        progress = tuple((status.rank, *status.progress) for status in statuses)
        if (stalled := self.watch.unchanged("progress", progress)) > self.task.progress_timeout:
            missing = sorted(set(range(self.task.ranks)) - {status.rank for status in statuses})
            if missing:
                self.stop(f"rank {missing[0]} has not started within {stalled:.0f} s")
            else:
                slowest = min(statuses, key=lambda status: (status.step, status.micro_batch))
                self.stop(f"no rank has moved for {stalled:.0f} s; the slowest rank is at: {slowest}", slowest)

    def _all_done(self, statuses: Sequence[RankStatus]) -> bool:
        """Whether `DONE` exists and every rank has reported that it is done."""
        done = [status for status in statuses if status.phase == "done"]
        return len(done) == self.task.ranks and (self.folder / "DONE").exists()

    def _verdict(self, code: int) -> int:
        """Write `FAILED` unless all is well; a rank's reason wins, unless it only lost another.

        `code` is that of the first launcher that failed by itself, or 0.
        """
        statuses = read_heartbeats(self.folder)
        if code == 0 and self._all_done(statuses):
            return 0
        failure = reported_failure(self.folder)
        # A rank that failed before its first heartbeat left its error in the log only.
        error = logged_error(self.folder) if len(statuses) < self.task.ranks else ""
        if self.reason:
            failure = failure_record(self.blamed, self.reason)
        elif failure is None and error:
            failure = failure_record(None, error)
        elif not is_explained(self.folder) and self.dead:
            failure = failure_record(self.dead[0], killed_reason(self.folder, self.dead[0], code))
        elif failure is None:
            done = sum(status.phase == "done" for status in statuses)
            done_of = f"{done} of {self.task.ranks} ranks were done"
            failure = failure_record(None, f"the launcher ended with exit code {code}, and {done_of}")
        failure = explain_taken_port(failure)
        with suppress(OSError):
            (self.folder / "DONE").unlink(missing_ok=True)
        with suppress(OSError):
            write_json(self.folder / "FAILED", failure)
        return 1


if __name__ == "__main__":
    main()
