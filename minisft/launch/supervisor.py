"""The process between a notebook and a run's ranks: whatever happens to either, nothing is left behind.

`minisft.launch.launch_run` starts it, in a session of its own, and says as its first line a `Task` in JSON; the
argument, the run folder, is for people who look at processes. It starts the task's command, watches the ranks
(`minisft.training.heartbeat`), and ends everything when the command ends, when a rank hangs or dies, when its standard
input says so or closes, or when its parent is gone. On Linux, processes whose parents die become its own children, so
that none escapes; should it be killed itself, the ranks notice and end.

What the ranks want a person to see goes to its standard output; all else goes to the log. `FAILED` is written last.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from minisft import processes
from minisft.errors import UserError
from minisft.files import last_lines, open_own, read_json, write_json
from minisft.launch.commands import Command
from minisft.launch.guardian import Guardian
from minisft.processes import lives
from minisft.run.records import FailureRecord
from minisft.system import is_here
from minisft.text import one_line, say
from minisft.training.heartbeat import (
    BEAT,
    GUARDIAN,
    MARK,
    SUPERVISOR,
    VOICE,
    RankStatus,
    SupervisorStatus,
    Watch,
    announcement,
    read_heartbeats,
    write_failure,
)

LOOK = 0.25  # seconds between two looks at the launcher
POLITE = 2.0  # seconds between asking a process to end and ending it
GRACE = 5.0  # seconds that a launcher has to notice that one of its ranks is gone
SSH_FAILED = 255  # ssh's own exit code, where it is not the command's
GONE = "the process that started it is gone"
# How the death of one rank shows in the others: not the reason for anything.
LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|closed by peer|recvvalue failed|sendbytes failed|"
    r"remote process exited|nccl.{0,300}(abort|remote error)|socket.{0,300}(timeout|closed)|DistNetworkError",
    re.IGNORECASE,
)
TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
ERROR = re.compile(r"(?<![\w.])[\w.]*(?:Error|Exception|Interrupt): .+|^minisft: .+")
NO_SPACE = 1 << 16  # bytes that are free on a disk on which nothing can be written
LONGEST_REASON = 2000  # characters
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Task:
    """What to run: `commands` in `working_directory`, which make `ranks` ranks that write into the run `folder`.

    A rank that gives no sign of life for `heartbeat_timeout` seconds, or a run in which no rank moves for
    `progress_timeout` seconds, is ended. `mark` is in the environment of every process of the run.
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
        values = json.loads(text)
        return cls(**values | {"commands": [Command(**command) for command in values["commands"]]})


def main() -> None:
    task, said = _first_line(0)
    supervisor = Supervisor(Task.from_json(task))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: supervisor.stop(f"stopped by {signal.Signals(number).name}"))
    if said:
        supervisor.stop(said.strip())
    sys.exit(supervisor.run())


def _first_line(number: int) -> tuple[str, str]:
    """The first line of an open file, and what came with it; read past Python's buffer, which `select` does not see."""
    found = b""
    while b"\n" not in found and (data := os.read(number, 1 << 16)):
        found += data
    line, _, more = found.partition(b"\n")
    return line.decode(), more.decode(errors="replace")


class Supervisor:
    """Runs one task to its end; see the module's first lines."""

    def __init__(self, task: Task):
        self.task, self.folder = task, Path(task.folder)
        self.watch = Watch()
        self.reason = ""  # why the run was ended before its time
        self.blamed: RankStatus | None = None  # the rank that this is about
        self.ends: dict[int, int] = {}  # file descriptors that become readable when a process ends, and its rank
        self.watched: set[int] = set()
        self.over = False  # a host has failed, and the ranks have said why
        self.gone: list[RankStatus] = []  # ranks that ended without last words, in the order in which they did
        self.gone_at = self.failed_at = 0.0

    def stop(self, reason: str, blamed: RankStatus | None = None) -> None:
        """End the run soon, for the first reason that is given."""
        if not self.reason:
            self.reason, self.blamed = reason, blamed

    def run(self) -> int:
        """Returns 0 if the command, every rank and `DONE` say that all went well, else 1; then `FAILED` says why."""
        _adopt_orphans()
        parent = os.getppid()
        mark = self.task.mark or secrets.token_hex(8)
        guardian = Guardian(self.folder, mark)
        own = processes.environment() | {MARK: mark, VOICE: mark, GUARDIAN: str(guardian.pid), "PYTHONUNBUFFERED": "1"}
        try:
            log = self._open_log()
            sign = SupervisorStatus(self.folder)
        except (UserError, OSError) as error:
            write_failure(self.folder, _failure(None, f"{self.folder.name} cannot be started: {one_line(error)}"))
            guardian.dismiss()
            return 1
        own |= {SUPERVISOR: sign.name}
        launchers = [
            subprocess.Popen(
                command.words,
                cwd=self.task.working_directory,
                env={name: own[name] for name in own if name not in command.withheld} | command.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.end_with_parent,  # before any thread is started
            )
            for command in self.task.commands
        ]
        to_show = announcement(mark)
        readers = [
            threading.Thread(target=_copy_output, args=(one.stdout, log, to_show), daemon=True) for one in launchers
        ]
        for reader in readers:
            reader.start()
        looked = beaten = 0.0
        interval = max(0.5, self.task.ranks / 100)  # as many files to read as there are ranks
        while any(one.poll() is None for one in launchers) and not (self.reason or self.over):
            self._listen(LOOK)
            now = time.monotonic()
            if now - beaten > BEAT:
                sign.beat()
                beaten = now
                if os.getppid() != parent:
                    self.stop(GONE)
            if now - looked > interval:
                self._look_at_ranks()
                self._look_at(launchers)
                looked = now
        if not self.reason:
            self._look_at_ranks()
        sign.remove()  # ranks on other hosts end with it
        end_all(launchers, guardian.pid)
        for reader in readers:
            reader.join(timeout=2)
        code = self._verdict(next((one.returncode for one in launchers if one.returncode), 0))
        for command in self.task.commands:
            _remove_shared_memory(command.words)
        guardian.dismiss()
        return code

    def _open_log(self) -> Any:
        """A new log of the launchers; an earlier one, which may have a second name elsewhere, is left as it is."""
        file = self.folder / "logs" / "launcher.log"
        file.unlink(missing_ok=True)
        return os.fdopen(open_own(file, os.O_WRONLY | os.O_EXCL, private=True), "wb", buffering=0)

    def _look_at(self, launchers: Sequence[subprocess.Popen]) -> None:
        """One host's launcher that fails fails the run: the others' ranks would wait for its ranks."""
        for launcher, command in zip(launchers, self.task.commands, strict=True):
            if launcher.poll():
                self.failed_at = self.failed_at or time.monotonic()
                if time.monotonic() - self.failed_at < GRACE or len(launchers) == 1:
                    continue
                self.over = True
                if not self._said_why():
                    self.stop(self._why(command.host, launcher.returncode), self.gone[0] if self.gone else None)

    def _said_why(self) -> bool:
        """Whether a rank has given a reason of its own, and not that it has lost another."""
        failure = self._failed()
        return failure is not None and (not LOST.search(failure["reason"]) or bool(TAKEN.search(failure["reason"])))

    def _failed(self) -> FailureRecord | None:
        """What a rank has written into `FAILED`, its reason cut to a length that is quickly searched."""
        with suppress(UserError):
            if (failure := read_json(self.folder / "FAILED", FailureRecord)) is not None:
                return failure | {"reason": failure["reason"][:LONGEST_REASON]}
        return None

    def _killed(self, sign: RankStatus, code: int = 0) -> str:
        if shutil.disk_usage(self.folder).free < NO_SPACE:
            return f"no space is left on the disk of {self.folder} ({sign}): free some"
        how = {247: " by SIGKILL", -9: " by SIGKILL", 245: " by a segmentation fault", -11: " by a segmentation fault"}
        return f"process {sign.pid} ended without a word ({sign}): killed{how.get(code, '')}, or short of memory"

    def _why(self, host: str, code: int) -> str:
        if code == SSH_FAILED:
            said = _last_line(self.folder / "logs" / "launcher.log")
            return f"host {host} could not be reached, or the connection to it was lost ({said})"
        return f"the ranks of host {host} ended before the others (exit code {code})"

    def _listen(self, seconds: float) -> None:
        """Wait; a line from the parent is a reason to stop, and so is the end of the line to it.

        The end of a rank wakes it as well: the first to go is the reason, and soon its launcher ends the others.
        """
        ready, _, _ = select.select([sys.stdin, *self.ends], [], [], seconds)
        for end in ready:
            if end is sys.stdin:
                said = sys.stdin.readline()
                self.stop(said.strip() or GONE)
            else:
                os.close(end)
                self._look_at_end(self.ends.pop(end))

    def _look_at_end(self, rank: int) -> None:
        # Read anew: between an earlier reading and its end the rank may have said that it is done.
        sign = next((sign for sign in read_heartbeats(self.folder) if sign.rank == rank), None)
        if sign is not None and not sign.ended and rank not in {other.rank for other in self.gone}:
            self.gone.append(sign)
            self.gone_at = self.gone_at or time.monotonic()

    def _watch_end(self, sign: RankStatus) -> None:
        """Let the end of a rank of this machine wake `_listen`, where the system can (Linux)."""
        if sign.rank not in self.watched and hasattr(os, "pidfd_open"):
            self.watched.add(sign.rank)
            with suppress(OSError):
                self.ends[os.pidfd_open(sign.pid)] = sign.rank

    def _look_at_ranks(self) -> None:
        signs = read_heartbeats(self.folder)
        for sign in signs:
            if sign.ended:
                continue
            here = is_here(sign.host)
            if here:
                self._watch_end(sign)
            if here and not lives(sign.pid):
                self._look_at_end(sign.rank)
            elif (silent := self.watch.unchanged(("life", sign.rank), sign.changed)) > self.task.heartbeat_timeout:
                self.stop(f"no sign of life for {silent:.0f} s ({sign}): it hangs, or was halted", sign)
        if self.gone and time.monotonic() - self.gone_at > GRACE:
            if self._said_why():  # its launcher ended it for a neighbour's sake
                self.over = True
            else:
                self.stop(self._killed(self.gone[0]), self.gone[0])
        progress = tuple((sign.rank, *sign.progress) for sign in signs)
        if (stalled := self.watch.unchanged("progress", progress)) > self.task.progress_timeout:
            missing = sorted(set(range(self.task.ranks)) - {sign.rank for sign in signs})
            if missing:
                self.stop(f"rank {missing[0]} has not started within {stalled:.0f} s")
            else:
                last = min(signs, key=lambda sign: (sign.step, sign.micro_batch))
                self.stop(f"no rank has moved for {stalled:.0f} s; the last of them is here: {last}", last)

    def _verdict(self, code: int) -> int:
        """Write `FAILED` unless all is well; the ranks' own words come first, unless they are about another's end."""
        signs = read_heartbeats(self.folder)
        done = [sign.rank for sign in signs if sign.phase == "done"]
        if code == 0 and (self.folder / "DONE").exists() and len(done) == self.task.ranks:
            return 0
        failure = self._failed()
        # A rank that broke before it could speak has told the launcher's log; the others were ended for it.
        said = _last_error(self.folder / "logs" / "launcher.log") if len(signs) < self.task.ranks else ""
        if self.reason:
            failure = _failure(self.blamed, self.reason)
        elif failure is None and said:
            failure = _failure(None, said)
        elif not self._said_why() and self.gone:
            failure = _failure(self.gone[0], self._killed(self.gone[0], code))
        elif failure is None:
            done_of = f"{len(done)} of {self.task.ranks} ranks were done"
            failure = _failure(None, f"the launcher ended with exit code {code}, and {done_of}")
        if TAKEN.search(failure["reason"]):
            reason = f"the port was taken by another process before rank 0 could listen on it ({failure['reason']})"
            failure = failure | {"reason": f"{reason}: rerun the same command, which takes another port"}
        with suppress(OSError):
            (self.folder / "DONE").unlink(missing_ok=True)
        with suppress(OSError):
            write_json(self.folder / "FAILED", failure)
        return 1


def _copy_output(stream: Any, log: Any, to_show: str) -> None:
    for line in stream:
        with suppress(OSError):  # a full disk or a gone reader must not stop it: the workers would wait
            log.write(line)
        text = line.decode(errors="replace").rstrip()
        if text.startswith(to_show):
            with suppress(OSError):
                say(text.removeprefix(to_show))


def end_all(launchers: Sequence[subprocess.Popen], spared: int = 0) -> None:
    """End launchers and all that they have started, the process `spared` excepted: first politely, then surely."""
    me = psutil.Process()

    def family() -> list[psutil.Process]:
        found = [child for child in me.children(recursive=True) if child.pid != spared]
        return [child for child in found if lives(child.pid)]

    for launcher in launchers:
        if launcher.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
    until = time.monotonic() + POLITE
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=max(0.0, until - time.monotonic()))
    began = time.monotonic()
    while left := family():
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.terminate() if time.monotonic() - began < POLITE / 4 else child.kill()
        psutil.wait_procs(left, timeout=0.2)
        if time.monotonic() - began > 2 * POLITE:
            break  # not even SIGKILL ends a process that waits for a dead disk
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=1)
    for child in me.children():
        with suppress(psutil.Error):
            if child.pid != spared:
                child.wait(timeout=0)  # adopted, and dead


def _failure(sign: RankStatus | None, reason: str) -> FailureRecord:
    if sign is None:
        return {"rank": None, "step": None, "reason": reason}
    return {"rank": sign.rank, "step": sign.step, "reason": reason}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in last_lines(log) if line.strip()]
    return one_line(lines[-1], 300) if lines else ""


def _last_error(log: Path) -> str:
    """The last line of a log that names an exception."""
    for line in reversed(last_lines(log)):
        if match := ERROR.search(line[:LONGEST_REASON]):
            return match[0][:500]
    return ""


def _adopt_orphans() -> None:
    """From now on descendants whose parents die become children of this process (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _remove_shared_memory(command: list[str]) -> None:
    """The buffers through which DeepSpeed's CPU ranks talk have names until all ranks have opened them."""
    if "--master_port" in command:
        port = command[command.index("--master_port") + 1]
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # noqa: S108
            with suppress(OSError):
                file.unlink()


if __name__ == "__main__":
    main()
