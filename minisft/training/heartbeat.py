"""Heartbeats: each rank of a run records what it is doing in a file of the run folder.

`ranks/rank0.json` holds the host and the pid of rank 0, its phase, step and micro-batch. The
content changes with the micro-batches; the modification time changes once a second, as long as the
process lives. So a rank that hangs can be told from one that waits for it, on this machine and,
through a shared folder, on any other.

The run's supervisor has a heartbeat, too (`ranks/supervisor.json`): a rank ends when its supervisor
is gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import as_json, read_json, remove_all, write_json
from minisft.processes import end_with_parent, lives, start_of
from minisft.run.records import FailureRecord, RankHeartbeat

FOLDER = "ranks"  # in a run folder

# Environment variables of a rank.
MARK = "MINISFT_SUPERVISED"  # in every process of a supervised run; the value identifies the run
SUPERVISOR = "MINISFT_SUPERVISOR"  # host:pid of the supervisor; not set if the rank was started by hand
GUARDIAN = "MINISFT_GUARDIAN"  # pid of the process that ends the ranks of a dead supervisor
HOST = "MINISFT_HOST"  # the rank's host, as the hostfile calls it
# `SUPERVISOR` on other hosts: only the heartbeat file tells whether the supervisor lives, since
# machines may share a host name.
SUPERVISOR_ELSEWHERE = ":0"

BEAT = 1.0  # seconds between two heartbeats
HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a rank is considered hung
PROGRESS_TIMEOUT = 1800.0  # seconds without progress; the default timeout of PyTorch's collectives, too
FORGIVEN = 30.0  # seconds that another host's heartbeat may be late, since shared file systems are slow
OFTEN = 0.2  # minimum seconds between two micro-batches that are recorded
MISSED = 2.0  # seconds after which a missing file counts as removed
LAST = ("done", "failed")  # the phases in which a rank ends


@dataclass(frozen=True)
class RankStatus(RankHeartbeat):
    """The last heartbeat of a rank.

    `changed` is the modification time of its file, in seconds since 1970, which advances as long as
    the rank lives. `began` is by the clock of the rank's host.
    """

    changed: float = 0.0

    @property
    def progress(self) -> tuple[str, int, int]:
        return self.phase, self.step, self.micro_batch

    @property
    def ended(self) -> bool:
        """Whether the rank itself reported its end."""
        return self.phase in LAST

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step}"


class Heartbeat:
    """Writes the heartbeat of this rank, from a thread, until `stop`.

    `step` is the last finished step. If the file cannot be written, the heartbeat is lost, but the
    rank continues.
    """

    def __init__(self, run_folder: Path, rank: int):
        self.file = run_folder / FOLDER / f"rank{rank}.json"
        self.step = 0
        # One machine may stand for several hosts of a hostfile; the variable tells them apart.
        host = os.environ.get(HOST) or socket.gethostname()
        self._identity = {"rank": rank, "host": host, "pid": os.getpid()}
        self._micro_batch = 0
        self._began: dict[str, float] = {}
        self._written = 0.0
        self._stop = threading.Event()
        self.file.parent.mkdir(exist_ok=True)
        self.says("starting")
        threading.Thread(target=self._beat, daemon=True).start()

    def says(self, phase: str) -> None:
        """Record that a phase begins, such as `loading` or `training`."""
        self._phase, self._micro_batch = phase, 0
        self._began.setdefault(phase, time.time())
        self._write()

    def micro_batch(self) -> None:
        """Record that the next micro-batch of this step begins."""
        self._micro_batch += 1
        if time.monotonic() - self._written > OFTEN:
            self._write()

    def stop(self, last_word: str) -> None:
        """End the heartbeat with the phase `done` or `failed`."""
        self._stop.set()
        self.says(last_word)

    def _write(self) -> None:
        state = {"phase": self._phase, "step": self.step, "micro_batch": self._micro_batch, "began": self._began}
        with suppress(OSError):
            write_json(self.file, self._identity | state)
        self._written = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):
                os.utime(self.file)


def read_heartbeats(run_folder: Path) -> list[RankStatus]:
    """Return the last heartbeat of each rank that has one, by rank; skip unreadable files."""
    statuses = []
    for file in (run_folder / FOLDER).glob("rank*.json"):
        with suppress(OSError, UserError):  # the rank may be replacing it at this moment
            if (heartbeat := read_json(file, RankHeartbeat)) is not None:
                statuses.append(RankStatus(**vars(heartbeat), changed=file.stat().st_mtime))
    return sorted(statuses, key=lambda status: status.rank)


def write_failure(run_folder: Path, failure: FailureRecord) -> None:
    """Write `FAILED` unless it exists: the first failure matters. A full disk leaves no file."""
    file = run_folder / "FAILED"
    with suppress(OSError), file.open("x", encoding="utf-8") as stream:
        try:
            stream.write(as_json(failure) + "\n")
            stream.flush()
        except OSError:
            file.unlink()


def clear(run_folder: Path) -> None:
    """Remove the heartbeats of an earlier try."""
    remove_all(run_folder / FOLDER)


class SupervisorStatus:
    """Writes the heartbeat of the supervisor: call `beat` every second, and `remove` at the end."""

    def __init__(self, run_folder: Path):
        self.file = run_folder / FOLDER / "supervisor.json"
        self.file.parent.mkdir(exist_ok=True)
        with suppress(OSError):
            write_json(self.file, {"host": socket.gethostname(), "pid": os.getpid()})

    @property
    def name(self) -> str:
        """The value for `SUPERVISOR`."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def beat(self) -> None:
        with suppress(OSError):
            os.utime(self.file)

    def remove(self) -> None:
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


def end_with_supervisor(run_folder: Path, heartbeat: Heartbeat) -> None:
    """From now on, end this process soon after its supervisor is gone, for whatever reason."""
    supervisor = os.environ.get(SUPERVISOR)
    if not supervisor:
        return
    host, _, pid = supervisor.rpartition(":")
    file = run_folder / FOLDER / "supervisor.json"
    is_local = host == socket.gethostname()
    began = start_of(int(pid)) if is_local else None
    guardian = int(os.environ.get(GUARDIAN) or 0)
    watch = Watch()
    if is_local:
        end_with_parent()

    def lost() -> bool:
        if not is_local:
            return watch.late(file, FORGIVEN)
        # A guardian ends a stopped supervisor; without one, a late heartbeat means that it stopped.
        return not lives(int(pid), began) or (not lives(guardian) and watch.late(file, FORGIVEN))

    def wait() -> None:
        while not lost():
            time.sleep(BEAT)
        heartbeat.stop("failed")
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Watch:
    """Measures how long a value has not changed, by our own clock: other hosts' may differ."""

    def __init__(self) -> None:
        self._last: dict[Any, tuple[Any, float]] = {}

    def unchanged(self, key: Any, value: Any) -> float:
        """Return the seconds since `key` was first seen with its present `value`."""
        now = time.monotonic()
        last = self._last.get(key)
        if last is None or last[0] != value:
            self._last[key] = value, now
            return 0.0
        return now - last[1]

    def late(self, file: Path, most: float) -> bool:
        """Return whether `file` was not touched for `most` seconds, or is missing for `MISSED`."""
        try:
            return self.unchanged(file, file.stat().st_mtime_ns) > most
        except OSError:
            return self.unchanged(file, None) > min(most, MISSED)
