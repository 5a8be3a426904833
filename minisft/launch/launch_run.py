"""Turns a prepared run folder into a finished run.

    run = launch(prepare(RunConfig.course("zero2")))

A supervisor runs the folder's command (`minisft.launch.supervisor`); this module starts the
supervisor, shows the run's progress, and stops it on a signal.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minisft import processes, text
from minisft.errors import UserError
from minisft.files import Tail, read_json, remove_all, write_json
from minisft.launch import cpu_comm_op
from minisft.launch.commands import Command, display_path
from minisft.launch.guardian import end_marked
from minisft.launch.hosts import Place
from minisft.launch.notebook_view import LiveView, in_notebook
from minisft.launch.prepare_run import HOSTS, Say, only_one, prepare, require_place, write_commands
from minisft.launch.supervisor import Task
from minisft.run.folder import Run, project_root, require_harmless_deepspeed, require_own_files
from minisft.run.records import HostsRecord
from minisft.text import one_line
from minisft.training import preflight
from minisft.training.checkpoints import resume_point
from minisft.training.dataset import require_as_made, require_same_model
from minisft.training.heartbeat import HEARTBEAT_TIMEOUT, PROGRESS_TIMEOUT, clear
from minisft.training.progress import PROGRESS

__all__ = ["RunFailed", "launch", "prepare"]
TICK = 0.25  # seconds between two checks for an interrupt


class RunFailed(RuntimeError):
    """A run that started but did not finish; the message names the rank, the reason and the log."""


def launch(
    run: Run,
    say: Say | None = None,
    *,
    place: Place | None = None,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    progress_timeout: float = PROGRESS_TIMEOUT,
) -> Run:
    """Run the prepared command to its end, on the hosts of `place` if given; return the run.

    `say` receives the run's output line by line; the default is a live view in a notebook, and
    printed lines elsewhere.

    The processes have a session to themselves, under a supervisor (`minisft.launch.supervisor`). It
    ends all of them if this process is interrupted or gone, if a rank dies or gives no sign of life
    for `heartbeat_timeout` seconds, or if no rank makes progress for `progress_timeout` seconds. A
    run succeeded if its exit code is 0, the `DONE` marker exists, and every rank reported `done`.

    Raises `RunFailed` or `KeyboardInterrupt` once all processes are gone, and `UserError` if the
    run cannot be started, for example because it is being trained already.
    """
    with only_one(run.folder) as locks:
        if run.prepared and run.prepared != run.identity:
            raise UserError(f"{run.name} was prepared again since, with other settings or rows: prepare it once more")
        is_done = run.status == "done"
        say = say or (LiveView(run) if in_notebook() and not is_done else text.say)
        if is_done:
            say(f"{run.name} is trained already, with exactly these settings (--overwrite trains it again)")
            return run
        place = place or run.place
        _require_startable(run, place, say)
        run = run.as_it_is()
        mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        host_commands = write_commands(run, run.folder, place, mark)
        _require_programs(host_commands)
        _clear_earlier_try(run)
        (run.folder / "logs").mkdir(exist_ok=True)
        for line in run.command.splitlines():
            say(line)
        task = Task(
            folder=str(run.folder),
            commands=host_commands,
            working_directory=str(project_root()),
            ranks=run.config.ranks,
            heartbeat_timeout=heartbeat_timeout,
            progress_timeout=progress_timeout,
            mark=mark,
        )
        interrupted = _follow(task, say, locks)
        end_marked(task.mark)
        if run.status != "done" and run.failure is None:  # the supervisor itself was killed
            write_json(run.folder / "FAILED", {"rank": None, "step": None, "reason": "the supervisor was killed"})
        if isinstance(say, LiveView):
            say.close()
    if run.status == "done":
        return run
    if interrupted:
        raise KeyboardInterrupt(f"{run.name} was stopped: {_resume_advice(run)}")
    raise RunFailed(_failure_message(run))


def _require_startable(run: Run, place: Place | None, say: Say) -> None:
    """Raise `UserError` if the user's consent or hosts are missing, or the run would fail later."""
    if run.written_config.trust_remote_code and not run.trust_remote_code:
        raise UserError(
            f"{display_path(run.folder)} asks to run code that comes with its model: read that code, and give "
            "--trust-remote-code if you trust it"
        )
    recorded = read_json(run.folder / HOSTS, HostsRecord)
    if "none" in (place and place.launcher, recorded and recorded["launcher"]):
        lines = display_path(run.folder / "command.txt")
        raise UserError(f"{run.name} waits to be started on its hosts: run on each host its line of {lines}")
    if place is None and recorded is not None:
        hosts = one_line(", ".join(recorded["hosts"]), 100)
        raise UserError(
            f"{run.name} was prepared for the hosts {hosts}, but a run folder does not decide where commands run: name "
            "them again with --hostfile"
        )
    require_place(run.config, place)
    require_own_files(run)
    require_as_made(run.folder)
    require_same_model(run)
    resume_point(run)
    _require_sound_deepspeed(run, say)
    if place is None and not run.on_gpu:
        preflight.warn_of_cores(run.config, say)


def _resume_advice(run: Run) -> str:
    """Say what the same command will do with an interrupted run."""
    try:
        checkpoint = resume_point(run)
    except UserError as error:
        return str(error)
    if checkpoint is None:
        return "the same command starts it from the beginning (--resumable lets a run resume)"
    return f"the same command resumes from {checkpoint.name}"


def _failure_message(run: Run) -> str:
    failure = run.failure
    assert failure is not None  # a run that is not done has `FAILED` by now
    rank = failure["rank"]
    where = "" if rank is None else f" on rank {rank}, step {failure['step']}"
    log = run.folder / "logs" / ("launcher.log" if rank is None else f"rank{rank}.log")
    return f"{run.name} failed{where}: {failure['reason']} (see {display_path(log)})"


def _require_sound_deepspeed(run: Run, say: Say) -> None:
    """Raise `UserError` for errors in `deepspeed.json`, which may be edited; say warnings."""
    if (config := run.deepspeed) is None:
        return
    from minisft.zero.lint_config import lint  # it imports DeepSpeed

    findings = lint(config, ranks=run.config.ranks)
    if errors := [finding for finding in findings if finding.severity == "error"]:
        messages = "; ".join(f"{finding.key} {finding.message}" for finding in errors)
        raise UserError(f"{display_path(run.folder / 'deepspeed.json')} cannot be trained with: {messages}")
    require_harmless_deepspeed(run)
    for finding in findings:
        say(f"deepspeed.json: {finding}")


def _require_programs(host_commands: Sequence[Command]) -> None:
    """Raise `UserError` if a program to be started is not installed."""
    for program in {command.words[0] for command in host_commands}:
        if shutil.which(program, path=cpu_comm_op.build_environment()["PATH"]) is None:
            raise UserError(f"there is no {program} in this environment: launchers/setup.sh installs what is missing")


def _clear_earlier_try(run: Run) -> None:
    """Remove an earlier try's heartbeats and, without a checkpoint to resume from, its results."""
    (run.folder / "FAILED").unlink(missing_ok=True)
    clear(run.folder)
    for scratch in run.folder.glob(".minisft-*"):
        if scratch.is_file():  # half-written when the earlier try was killed; a folder is the user's
            scratch.unlink()
    if resume_point(run):
        return
    for name in ("metrics.jsonl", "memory.json", "logs", "tensorboard"):
        remove_all(run.folder / name)
    for folder in run.checkpoints:  # without weights
        remove_all(folder)


def _follow(task: Task, say: Say, locks: list[int]) -> bool:
    """Let a supervisor run `task`, pass the run's progress to `say`, and return whether SIGINT stopped it.

    The supervisor inherits `locks` (file descriptors), so that nothing can replace the folder of a
    live run, even if this process dies.
    """
    cpu_comm_op.remove_stale_locks(cpu_comm_op.extensions_folder())
    progress = Tail(Path(task.folder) / PROGRESS)
    progress.new_lines()  # those of an earlier try have been shown
    stop: list[int] = []
    old_handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a signal ignored by nohup stays ignored
                old_handlers[number] = signal.signal(number, lambda number, _: stop.append(number))
    supervisor = subprocess.Popen(
        processes.python("-m", "minisft.launch.supervisor", task.folder),
        # The programs of this interpreter's environment, even if it was not activated.
        env=processes.environment() | cpu_comm_op.build_environment(),
        pass_fds=locks,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    with suppress(OSError):  # a supervisor that ended at once has already reported why
        # Not as an argument: arguments are public and limited in length.
        supervisor.stdin.write(task.to_json() + "\n")
        supervisor.stdin.flush()
    parent = os.getppid() if _ends_with_parent() else None
    stop_sent = False
    try:
        is_over = False
        while not is_over:
            with suppress(subprocess.TimeoutExpired):
                supervisor.wait(timeout=TICK)
            is_over = supervisor.returncode is not None  # the last lines are shown all the same
            for line in progress.new_lines():
                say(line)
            if isinstance(say, LiveView):
                say.tick()
            if not stop_sent and (stop or parent not in (None, os.getppid())):
                why = f"stopped by {signal.Signals(stop[0]).name}" if stop else "stopped because its parent is gone"
                with suppress(OSError):
                    supervisor.stdin.write(f"{why}\n")
                    supervisor.stdin.flush()
                stop_sent = True
    finally:
        with suppress(OSError):
            supervisor.stdin.close()  # whatever happened here, the supervisor now ends the run
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    return stop[:1] == [signal.SIGINT]


def _ends_with_parent() -> bool:
    """Return whether this process must stop when its parent, such as a notebook kernel, is gone.

    A terminal sends SIGHUP when it closes, unless `disown` prevents it, so its processes need no
    such check. A process that ignores SIGHUP (`nohup`) or leads a session (`setsid`) is meant to
    keep running.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or os.getsid(0) == os.getpid():
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False
