"""Finds out why a run failed, from `FAILED`, the launchers' log and the ranks' heartbeats."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from minisft.errors import UserError
from minisft.files import last_lines, read_json
from minisft.run.records import FailureRecord
from minisft.text import one_line
from minisft.training.heartbeat import RankStatus

LAUNCHER_LOG = "logs/launcher.log"  # in a run folder
SSH_FAILED = 255  # exit code of ssh itself, as opposed to that of its command
# What the other ranks report when one rank dies: a consequence, never the reason.
LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|closed by peer|recvvalue failed|sendbytes failed|"
    r"remote process exited|nccl.{0,300}(abort|remote error)|socket.{0,300}(timeout|closed)|DistNetworkError",
    re.IGNORECASE,
)
TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
ERROR = re.compile(r"(?<![\w.])[\w.]*(?:Error|Exception|Interrupt): .+|^minisft: .+")
NO_SPACE = 1 << 16  # free bytes below which nothing can be written to a disk
LONGEST_REASON = 2000  # characters
# By exit code, which is -signal for a killed process, and 256 - signal for a launcher that passes
# it on: signal 9 is SIGKILL, 11 is SIGSEGV.
KILLED_BY = {247: " by SIGKILL", -9: " by SIGKILL", 245: " by a segmentation fault", -11: " by a segmentation fault"}


def failure_record(status: RankStatus | None, reason: str) -> FailureRecord:
    """Return the content of `FAILED` for this reason and, if there is one, this rank."""
    if status is None:
        return {"rank": None, "step": None, "reason": reason}
    return {"rank": status.rank, "step": status.step, "reason": reason}


def reported_failure(run_folder: Path) -> FailureRecord | None:
    """Return what a rank wrote to `FAILED`; a long reason is cut, so that it is quick to search."""
    with suppress(UserError):
        if (failure := read_json(run_folder / "FAILED", FailureRecord)) is not None:
            return failure | {"reason": failure["reason"][:LONGEST_REASON]}
    return None


def is_explained(run_folder: Path) -> bool:
    """Return whether a rank gave its own reason in `FAILED`, not just the loss of another rank."""
    failure = reported_failure(run_folder)
    return failure is not None and (not LOST.search(failure["reason"]) or bool(TAKEN.search(failure["reason"])))


def killed_reason(run_folder: Path, status: RankStatus, code: int = 0) -> str:
    """Return the reason if a rank ended without a report; `code` is its launcher's exit code."""
    if shutil.disk_usage(run_folder).free < NO_SPACE:
        return f"no space is left on the disk of {run_folder} ({status}): free some"
    return f"process {status.pid} ended without a word ({status}): killed{KILLED_BY.get(code, '')}, or short of memory"


def host_reason(run_folder: Path, host: str, code: int) -> str:
    """Return the reason for a host whose launcher ended first, with exit code `code`."""
    if code == SSH_FAILED:
        message = _last_line(run_folder / LAUNCHER_LOG)
        return f"host {host} could not be reached, or the connection to it was lost ({message})"
    return f"the ranks of host {host} ended before the others (exit code {code})"


def logged_error(run_folder: Path) -> str:
    """Return the last exception in the launchers' log, or "" if it has none.

    A rank that fails before it can write `FAILED` leaves its error there.
    """
    for line in reversed(last_lines(run_folder / LAUNCHER_LOG)):
        if match := ERROR.search(line[:LONGEST_REASON]):
            return match[0][:500]
    return ""


def explain_taken_port(failure: FailureRecord) -> FailureRecord:
    """Add what to do to a `failure` whose reason is a port that another process has taken."""
    if not TAKEN.search(failure["reason"]):
        return failure
    reason = f"the port was taken by another process before rank 0 could listen on it ({failure['reason']})"
    return failure | {"reason": f"{reason}: rerun the same command, which takes another port"}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in last_lines(log) if line.strip()]
    return one_line(lines[-1], 300) if lines else ""
