"""The supervisor's verdict, on stand-ins for ranks: small real processes that leave the signs that ranks leave."""

import json
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from minisft.launch.commands import Command
from minisft.launch.failure_reasons import LOST, killed_reason
from minisft.launch.supervisor import Task
from minisft.training.heartbeat import Heartbeat, RankStatus, Watch, read_heartbeats
from minisft.training.progress import PROGRESS

RANK = """
import os, signal, sys, time
from pathlib import Path
from minisft.training.heartbeat import Heartbeat
from minisft.training.progress import log_progress, progress
folder, rank, deeds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
def fail(reason):
    try:
        with (folder / "FAILED").open("x") as file:  # as ranks do: the first one's words stay
            file.write('{"rank": %d, "step": 1, "reason": "%s"}' % (rank, reason))
    except FileExistsError:
        pass
    heartbeat.stop("failed")
    sys.exit(1)
heartbeat = Heartbeat(folder, rank) if "mute" not in deeds else None
for deed in deeds:
    if deed == "train":
        heartbeat.says("training"); heartbeat.step += 1
    elif deed == "wait":
        time.sleep(60)
    elif deed == "rest":
        time.sleep(1.5)
    elif deed == "done":
        if rank == 0: (folder / "DONE").write_text("{}")
        heartbeat.stop("done")
    elif deed == "lost":
        time.sleep(0.5)
        fail("RuntimeError: Connection closed by peer")
    elif deed == "raise":
        fail("ValueError: my own")
    elif deed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "mute":
        raise ImportError("no module named nothing")
    elif deed == "say":
        print("a row of the data", flush=True); log_progress(folder); progress.info("hello")
"""
# What a launcher does: starts the ranks, and ends them all when one fails.
LAUNCHER = """
import json, os, signal, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", *words]) for words in json.loads(sys.argv[1])]
while any(r.poll() is None for r in ranks):
    if any(r.poll() for r in ranks):
        for r in ranks: r.kill()
    time.sleep(1)
if "stopped" in sys.argv: os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(max(abs(r.returncode) for r in ranks) if "quiet" not in sys.argv else 0)
"""


def launcher(folder, first_rank, *deeds, word=""):
    ranks = [[RANK, str(folder), str(first_rank + i), *words.split()] for i, words in enumerate(deeds)]
    return [sys.executable, "-c", LAUNCHER, json.dumps(ranks), word]


def supervise(folder, commands, ranks, heartbeat_timeout=30.0, progress_timeout=30.0, hosts=None):
    (folder / "logs").mkdir(exist_ok=True)
    named = [Command(words, {}, host) for words, host in zip(commands, hosts or [""] * len(commands), strict=True)]
    task = Task(str(folder), named, str(folder), ranks, heartbeat_timeout, progress_timeout)
    process = subprocess.Popen(
        [sys.executable, "-m", "minisft.launch.supervisor", task.folder],
        stdin=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(task.to_json() + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + 40
    family = set()
    while process.poll() is None:
        assert time.monotonic() < deadline
        family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.05)
    progress = folder / PROGRESS
    said = progress.read_text() if progress.exists() else ""
    process.stdin.close()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    failed = folder / "FAILED"
    return process.returncode, json.loads(failed.read_text()) if failed.exists() else None, said


def test_all_is_well_when_the_command_every_rank_and_the_marker_say_so(tmp_path):
    code, failure, said = supervise(tmp_path, [launcher(tmp_path, 0, "say train done", "train done")], 2)
    assert (code, failure, said) == (0, None, "hello\n")
    assert not (tmp_path / "ranks" / "supervisor.json").exists()


def test_a_launcher_that_is_stopped_after_its_ranks_are_done_is_ended(tmp_path):
    commands = [
        launcher(tmp_path, 0, "train done", "train done", word="stopped"),
        launcher(tmp_path, 2, "train rest done"),
    ]
    code, failure, _ = supervise(tmp_path, commands, 3, progress_timeout=99, hosts=["a", "b"])
    assert (code, failure) == (0, None)
    assert (tmp_path / "DONE").exists()


@pytest.mark.parametrize(
    ("deeds", "rank", "reason"),
    [
        (("train done", "train"), 1, "ended without a word"),  # though the launcher ended with exit code 0
        (("train rest lost", "train rest killed"), 1, "ended without a word"),
        (("train wait", "train rest killed"), 1, "ended without a word"),
        (("train lost", "train raise"), 1, "ValueError: my own"),
        (("train wait", "mute"), None, "ImportError: no module named nothing"),
    ],
)
def test_the_first_reason_is_the_one_that_is_written(tmp_path, deeds, rank, reason):
    word = "quiet" if deeds[0] == "train done" else ""
    code, failure, _ = supervise(tmp_path, [launcher(tmp_path, 0, *deeds, word=word)], 2)
    assert code == 1
    assert reason in failure["reason"], failure
    assert failure["rank"] == rank
    assert not (tmp_path / "DONE").exists()


def test_a_rank_that_was_ended_for_its_neighbours_sake_is_not_blamed(tmp_path):
    """Two hosts of two ranks each: the other host's launcher goes on for longer than the grace that is given."""
    commands = [
        launcher(tmp_path, 0, "train wait", "train wait"),
        launcher(tmp_path, 2, "train wait", "train rest raise"),
    ]
    code, failure, _ = supervise(tmp_path, commands, 4, hosts=["a", "b"])
    assert (code, failure) == (1, {"rank": 3, "step": 1, "reason": "ValueError: my own"})


def test_a_run_in_which_nothing_moves_is_ended(tmp_path):
    code, failure, _ = supervise(
        tmp_path, [launcher(tmp_path, 0, "train train wait", "train wait")], 2, progress_timeout=3
    )
    assert code == 1
    assert failure["rank"] == 1
    assert "no rank has moved for 3 s" in failure["reason"]


def test_a_rank_that_never_comes_is_named(tmp_path):
    code, failure, _ = supervise(tmp_path, [launcher(tmp_path, 0, "train wait")], 2, progress_timeout=3)
    assert code == 1
    assert "rank 1 has not started within 3 s" in failure["reason"]


def test_a_host_that_cannot_be_reached_fails_the_run(tmp_path):
    unreachable = [sys.executable, "-c", "import sys; print('ssh: no route to host'); sys.exit(255)"]
    commands = [launcher(tmp_path, 0, "train wait"), unreachable]
    code, failure, _ = supervise(tmp_path, commands, 2, hosts=["a", "b"])
    assert code == 1
    assert "host b could not be reached, or the connection to it was lost (ssh: no route to host)" in failure["reason"]


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234",
        "RuntimeError: Read error [127.0.0.1]:1234: Connection reset by peer",
        "DistBackendError: NCCL error: remote process exited or there was a network error",
    ],
)
def test_the_death_of_another_is_known_by_its_words(reason):
    assert LOST.search(reason)


def test_a_rank_lives_visibly_while_it_does_nothing(tmp_path):
    heartbeat = Heartbeat(tmp_path, 3)
    before = read_heartbeats(tmp_path)[0]
    time.sleep(1.3)
    (after,) = read_heartbeats(tmp_path)
    assert after.changed > before.changed
    assert after.progress == before.progress == ("starting", 0, 0)
    heartbeat.stop("done")
    (last,) = read_heartbeats(tmp_path)
    assert last.ended


def test_signs_that_are_half_written_are_no_signs(tmp_path):
    Heartbeat(tmp_path, 0).stop("done")
    (tmp_path / "ranks" / "rank1.json").write_text('{"rank": 1,')
    assert [sign.rank for sign in read_heartbeats(tmp_path)] == [0]


def test_a_watch_goes_by_its_own_clock(tmp_path, monkeypatch):
    from minisft.training import heartbeat

    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    watch, file = Watch(), tmp_path / "beat"
    file.write_text("")
    assert not watch.late(file, 30)
    now[0] += 29
    assert not watch.late(file, 30)
    now[0] += 2
    assert watch.late(file, 30)
    file.unlink()
    assert not watch.late(file, 30)  # it may be replaced just now
    now[0] += 3
    assert watch.late(file, 30)


@pytest.mark.attack("8")
def test_a_full_disk_is_not_told_as_lack_of_memory(tmp_path, monkeypatch):
    sign = RankStatus(0, "here", 1, "training", 3, 0, {}, 0.0)
    assert "short of memory" in killed_reason(tmp_path, sign)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    assert killed_reason(tmp_path, sign) == f"no space is left on the disk of {tmp_path} (training, step 3): free some"


def test_a_task_of_very_many_hosts_fits(tmp_path):
    """Linux takes no argument of more than 128 KiB."""
    idle = [[sys.executable, "-c", "pass", "x" * 100_000] for _ in range(3)]
    code, failure, _ = supervise(tmp_path, [launcher(tmp_path, 0, "train done", "train done"), *idle], 2)
    assert (code, failure) == (0, None)


def test_what_a_rank_says_before_it_lives_is_the_reason(tmp_path):
    code, failure, _ = supervise(tmp_path, [[sys.executable, "-c", "print('minisft: no such model'); exit(2)"]], 1)
    assert (code, failure["reason"]) == (1, "minisft: no such model")
