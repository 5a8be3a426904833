"""Signs of life: what each rank of a run is doing, in files of the run folder that everybody may read.

`ranks/rank0.json` says which process on which host is rank 0, and what it does. Its content changes with every
micro-batch; once a second its time of change moves, as long as the process lives. So a rank that hangs can be told
from one that waits for it, on this machine and, through a shared folder, on any other.

The run's supervisor leaves a sign, too (`ranks/supervisor.json`): a rank whose supervisor is gone ends.
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
from minisft.text import say

MARK = "MINISFT_SUPERVISED"  # in the environment of every process that the supervisor starts: its value names the run
FOLDER = "ranks"  # of a run folder
SUPERVISOR = "MINISFT_SUPERVISOR"  # host:process, in a rank's environment; not there if it was started by hand
GUARDIAN = "MINISFT_GUARDIAN"  # the process that ends what a dead supervisor leaves
# Of one elsewhere: known by the sign that it leaves in the run folder alone, as machines may share a name.
SUPERVISOR_ELSEWHERE = ":0"
VOICE = "MINISFT_VOICE"  # a word that only this run's processes know, in front of what they announce
HOST = "MINISFT_HOST"  # a rank's host, as the hostfile calls it
BEAT = 1.0  # seconds between two signs of life
HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a rank counts as hanging; it beats every second
PROGRESS_TIMEOUT = 1800.0  # seconds without progress: what PyTorch's collectives wait at most, too
FORGIVEN = 30.0  # seconds for which another host's sign may be late: file systems that are shared take their time
OFTEN = 0.2  # seconds between two micro-batches that are written down
MISSED = 2.0  # seconds after which a file that is not there counts as removed
LAST = ("done", "failed")  # a rank's last words


@dataclass(frozen=True)
class RankStatus:
    """What a rank said last. `changed` is its file's time of change: it moves, in jumps, while the rank lives.

    `began` is when it first said each of its phases, by its host's clock, in seconds since 1970.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    micro_batch: int
    began: dict[str, float]
    changed: float

    @property
    def progress(self) -> tuple[str, int, int]:
        return self.phase, self.step, self.micro_batch

    @property
    def ended(self) -> bool:
        """Whether the rank has come to its end in its own words."""
        return self.phase in LAST

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step}"


class Heartbeat:
    """A rank's own side: says what it does, and lives visibly until `stop`.

    `step` is the last step that is finished. A file system that cannot be written to silences it, and stops nothing.
    """

    def __init__(self, run_folder: Path, rank: int):
        self.file = run_folder / FOLDER / f"rank{rank}.json"
        self.step = 0
        # A machine that plays several hosts tells them apart by name.
        host = os.environ.get(HOST) or socket.gethostname()
        self._about = {"rank": rank, "host": host, "pid": os.getpid()}
        self._micro_batch = 0
        self._began: dict[str, float] = {}
        self._written = 0.0
        self._stop = threading.Event()
        self.file.parent.mkdir(exist_ok=True)
        self.says("starting")
        threading.Thread(target=self._beat, daemon=True).start()

    def says(self, phase: str) -> None:
        self._phase, self._micro_batch = phase, 0
        self._began.setdefault(phase, time.time())
        self._write()

    def micro_batch(self) -> None:
        """One more of this step's micro-batches begins."""
        self._micro_batch += 1
        if time.monotonic() - self._written > OFTEN:
            self._write()

    def stop(self, last_word: str) -> None:
        self._stop.set()
        self.says(last_word)

    def _write(self) -> None:
        now = {"phase": self._phase, "step": self.step, "micro_batch": self._micro_batch, "began": self._began}
        with suppress(OSError):
            write_json(self.file, self._about | now)
        self._written = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):
                os.utime(self.file)


def announcement(voice: str) -> str:
    """What begins a rank's line that the person is to see, beside the log: no text of the data passes for one."""
    return f"[minisft {voice}] " if voice else "[minisft] "


def announce(text: str) -> None:
    """Tell the person who has started the run."""
    say(announcement(os.environ.get(VOICE, "")) + text)


def read_heartbeats(run_folder: Path) -> list[RankStatus]:
    """What the ranks of a run said last, those that have said anything, by rank."""
    found = []
    for file in (run_folder / FOLDER).glob("rank*.json"):
        with suppress(OSError, UserError):  # a rank may be replacing it just now
            if (said := read_json(file, RankHeartbeat)) is not None:
                found.append(RankStatus(**vars(said), changed=file.stat().st_mtime))
    return sorted(found, key=lambda sign: sign.rank)


def write_failure(run_folder: Path, failure: FailureRecord) -> None:
    """Write `FAILED` unless somebody was first: the first failure is the one to read. A full disk takes none."""
    file = run_folder / "FAILED"
    with suppress(OSError), file.open("x", encoding="utf-8") as stream:
        try:
            stream.write(as_json(failure) + "\n")
            stream.flush()
        except OSError:
            file.unlink()


def clear(run_folder: Path) -> None:
    """Forget what an earlier try said."""
    remove_all(run_folder / FOLDER)


class SupervisorStatus:
    """The supervisor's own side: `beat` it once in a while, and `remove` it at the end."""

    def __init__(self, run_folder: Path):
        self.file = run_folder / FOLDER / "supervisor.json"
        self.file.parent.mkdir(exist_ok=True)
        with suppress(OSError):
            write_json(self.file, {"host": socket.gethostname(), "pid": os.getpid()})

    @property
    def name(self) -> str:
        """What to put into `SUPERVISOR`."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def beat(self) -> None:
        with suppress(OSError):
            os.utime(self.file)

    def remove(self) -> None:
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


def end_with_supervisor(run_folder: Path, heartbeat: Heartbeat) -> None:
    """End this process soon after the supervisor named in the environment is gone, however it went."""
    named = os.environ.get(SUPERVISOR)
    if not named:
        return
    host, _, pid = named.rpartition(":")
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
        # A supervisor that is stopped is its guardian's to end; without one, its silence says that it is.
        return not lives(int(pid), began) or (not lives(guardian) and watch.late(file, FORGIVEN))

    def wait() -> None:
        while not lost():
            time.sleep(BEAT)
        heartbeat.stop("failed")
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Watch:
    """Tells for how long a thing has not changed, by this process's own clock: other hosts' clocks may be wrong."""

    def __init__(self) -> None:
        self._last: dict[Any, tuple[Any, float]] = {}

    def unchanged(self, key: Any, value: Any) -> float:
        """Seconds since `value` of `key` was last seen to be another."""
        now = time.monotonic()
        before = self._last.get(key)
        if before is None or before[0] != value:
            self._last[key] = value, now
            return 0.0
        return now - before[1]

    def late(self, file: Path, most: float) -> bool:
        """Whether `file` is gone for good, or has not been touched for `most` seconds."""
        try:
            return self.unchanged(file, file.stat().st_mtime_ns) > most
        except OSError:
            return self.unchanged(file, None) > min(most, MISSED)
