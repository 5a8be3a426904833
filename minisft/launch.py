"""From a `RunConfig` to a prepared run folder, to one exact command, to a finished run.

    run = prepare(RunConfig.course("zero2"))
    launch(run)

Everything that can be wrong with the input is found in `prepare`, before any process starts.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minisft import assets, operators, preflight, processes, text
from minisft.checkpoint_doctor import require_sound
from minisft.checkpoints import holds_weights, latest_resumable, resume_point
from minisft.commands import Command, commands, require_deepspeed, shown, write_place
from minisft.errors import UserError
from minisft.files import Digests, is_inside, open_lock, read_json, try_lock, write_json, written_whole
from minisft.hosts import Place, is_here
from minisft.ledger import Ledger
from minisft.lint import lint
from minisft.live import LiveView, in_notebook
from minisft.pulse import SILENCE, STALL, clear, read_signs
from minisft.run_files import Hosts
from minisft.runs import (
    Run,
    RunConfig,
    all_runs,
    lock_of,
    outputs_root,
    project_root,
    require_contained,
    require_no_links,
)
from minisft.supervisor import Task
from minisft.text import one_line, say
from minisft.tokens import HuggingFaceTokenizer
from minisft.training_data import made_of, remember, require_as_made, take_over, write_data
from minisft.zero_config import deepspeed_config, offloads

Say = Callable[[str], None]
HOSTS = "hosts.json"  # of a run folder: where it takes place
TICK = 0.25  # seconds between two looks for an interrupt


class RunFailed(RuntimeError):
    """A run that started and did not finish. The message names the rank, the reason and the log."""


# --- preparing ---------------------------------------------------------------------------------------------


def prepare(
    config: RunConfig,
    *,
    place: Place | None = None,
    overwrite: bool = False,
    restart: bool = False,
    say: Say = say,
) -> Run:
    """Make the run folder: data split and encoded, the DeepSpeed configuration, and the command.

    A finished run with the same settings is returned as it is, and so is an unfinished one that can be resumed from a
    checkpoint; one that holds no weights is prepared from the beginning. Any other run of this name is only replaced
    with `overwrite`, or with `restart` if it is unfinished, has the same settings and cannot be resumed: nothing that
    may hold weights is removed without either. The folder appears whole, by one rename; all of this is decided while
    its lock is held. `place` are the hosts to run on, if not this machine alone; they may differ when a run is resumed.
    Paths among the settings become absolute: `rows.json` elsewhere is another file. Raises `UserError`.
    """
    _require_place(config, place)
    config = _settled(config)
    folder = outputs_root() / "model" / config.name
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{shown(folder)} is a link to {folder.readlink()}, which is not there: correct or remove it")
    with _only_one(folder):
        if not overwrite and (run := _existing(config, folder, place, restart, say)) is not None:
            return run
        if overwrite:
            _require_replaceable(folder)
        scratch = _beside(folder, "preparing")
        try:
            return _prepare(config, place, folder, scratch, say)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _existing(config: RunConfig, folder: Path, place: Place | None, restart: bool, say: Say) -> Run | None:
    """The run in `folder` if it is done or can be resumed; None if a new one may take its place."""
    if not (folder / "run.json").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{shown(folder)} exists but is not a run folder: move it away, give this run another --name, or "
                "replace it with --overwrite"
            )
        return None
    run = Run(folder, config.trust_remote_code, place=place).as_it_is()
    before = _settled(run.config)
    if before != config:
        if run.status == "done" or holds_weights(folder):
            raise UserError(
                f"{shown(folder)} holds a run with other settings ({_difference(before, config)}): "
                f"{_why_not_resumed(before, config)}give this run another --name, or replace the old one with "
                "--overwrite"
            )
        return None
    if run.status == "done":
        return run
    checkpoint = latest_resumable(run) if restart else resume_point(run)
    if checkpoint is None:
        return None
    require_no_links(run)
    say(f"{config.name} was interrupted: it resumes from {checkpoint.name}")
    _write_commands(run, folder, place)
    return run


def _require_replaceable(folder: Path) -> None:
    """Refuse to replace, through a link, what is not a run. Raises `UserError`."""
    if folder.is_symlink() and not (folder / "run.json").is_file() and not _is_empty(folder):
        raise UserError(
            f"{shown(folder)} is a link to {folder.readlink()}, which is not a run folder: remove the link, or give "
            "this run another --name"
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _prepare(config: RunConfig, place: Place | None, folder: Path, scratch: Path, say: Say) -> Run:
    model = assets.find_model(config.model, say)
    source = assets.find_data(config.data, say).path
    for what, path in (("model", model.path), ("data", source)):
        if folder.exists() and is_inside(path, folder):
            raise UserError(
                f"the {what} {path} lies in the run folder that would be replaced, {shown(folder)}: give this run "
                "another --name"
            )
    require_sound(model.path, trust_remote_code=config.trust_remote_code)
    tokenizer = HuggingFaceTokenizer(model.path, config.template)
    architecture = preflight.model_config(model.path, config.trust_remote_code)
    precision, on_gpu = preflight.resolve_precision(config.precision)
    shapes = assets.parameter_shapes(model.path)

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)  # conversations are personal
    rows = _rows(config, source, model.path, tokenizer, scratch)
    parameters = sum(map(math.prod, shapes.values()))
    preflight.require_fit(config, architecture, rows)
    preflight.require_space(config, rows, parameters)
    preflight.warn_of_memory(config, architecture, precision, on_gpu, say)
    if offloads(config.strategy) and not on_gpu:
        say("Without a GPU everything is in main memory already: offloading works here, and saves nothing")
    about = {
        "config": config.to_dict(),
        "model_folder": str(model.path.absolute()),
        "model_source": model.source,
        "precision": precision,
        "on_gpu": on_gpu,
        "versions": _versions(),
    }
    write_json(scratch / "run.json", about)
    deepspeed = deepspeed_config(
        config.strategy,
        micro_batch=config.batch_size,
        accumulation=config.accumulation,
        ranks=config.ranks,
        max_grad_norm=config.max_grad_norm,
        precision=precision,
        largest_tensor=max(map(math.prod, shapes.values())),
        on_gpu=on_gpu,
    )
    if deepspeed:
        write_json(scratch / "deepspeed.json", deepspeed)
    _write_commands(Run(scratch, config.trust_remote_code).as_it_is(), folder, place)
    _replace(folder, scratch)
    return Run(folder, config.trust_remote_code, place=place).as_it_is()


def _beside(folder: Path, what: str) -> Path:
    """A hidden folder on the same disk as a run's, which may be a link to another."""
    real = folder.resolve()
    return real.with_name(f".{real.name}.{what}")


def _replace(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`, by renaming alone: whatever ends this, there is never half of one."""
    real, old = folder.resolve(), _beside(folder, "removed")
    _remove(old)
    if real.exists():
        real.rename(old)
    new.rename(real)
    _remove(old)


def _remove(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)


def _rows(config: RunConfig, source: Path, model: Path, tokenizer: HuggingFaceTokenizer, scratch: Path) -> int:
    """Write the data and its ledger into `scratch`, or copy them from a run that has the same; returns how many rows.

    Reading ShareGPT takes seconds, and the strategies that are compared want the same of it.
    """
    wanted = made_of(config, source, model, Digests())
    rows = take_over(wanted, [run.folder for run in all_runs()], scratch / "data")
    if rows is None:
        ledger = Ledger()
        rows = write_data(config, source, tokenizer, scratch / "data", ledger)
        write_json(scratch / "ledger.json", ledger.to_dict())
        remember(wanted, rows, scratch / "data")
    return rows


def _settled(config: RunConfig) -> RunConfig:
    return replace(config, model=assets.settled(config.model), data=assets.settled(config.data))


def _require_place(config: RunConfig, place: Place | None) -> None:
    if place is None:
        return
    require_deepspeed(config)
    if place.ranks != config.ranks:
        raise UserError(f"the hosts take {place.ranks} ranks, but {config.ranks} were asked for: make them equal")


def _write_commands(run: Run, folder: Path, place: Place | None, supervised: bool = False) -> list[Command]:
    """Write what starts `run`, which lies, or will lie, in `folder`: command.txt, and what several hosts need."""
    found = commands(run.config, folder, place, supervised, run.prepared)
    with written_whole(run.folder / "command.txt", private=True) as stream:
        stream.writelines(f"{command}\n" for command in found)
    if place is None:
        (run.folder / HOSTS).unlink(missing_ok=True)
    else:
        write_json(run.folder / HOSTS, place.to_dict())
        write_place(run.folder, place, supervised)
    return found


def _why_not_resumed(old: RunConfig, new: RunConfig) -> str:
    if (old.strategy, old.ranks) == (new.strategy, new.ranks):
        return ""
    return (
        f"its checkpoints hold the optimizer states as {old.strategy} lays them out over {old.ranks} rank(s), which no "
        "other strategy or number of ranks reads; go on with the old ones, start from its weights (--model "
        "outputs/model/<run>/checkpoint-N), "
    )


def _difference(old: RunConfig, new: RunConfig) -> str:
    a, b = old.to_dict(), new.to_dict()
    return ", ".join(f"{key.replace('_', ' ')} {a[key]} -> {b[key]}" for key in a if a[key] != b[key])


def _versions() -> dict[str, str]:
    packages = ("minisft", "torch", "transformers", "accelerate", "deepspeed", "datasets")
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: version(name) for name in packages}


# --- running -----------------------------------------------------------------------------------------------


def launch(
    run: Run,
    say: Say | None = None,
    *,
    place: Place | None = None,
    silence: float = SILENCE,
    stall: float = STALL,
) -> Run:
    """Run the prepared command to its end, on other hosts if `place` names some; returns when it is done.

    What the run says goes to `say`; without one, a live view in a notebook, printed lines elsewhere.

    The processes live in a session of their own, under a supervisor (`minisft.supervisor`) that ends them all if this
    process is interrupted or gone, if a rank dies, gives no sign of life for `silence` seconds, or if none moves for
    `stall` seconds. Success is exit code 0, the `DONE` marker, and every rank's word. Raises `RunFailed` or
    `KeyboardInterrupt`, once all processes are gone, or `UserError` if the run is live.
    """
    with _only_one(run.folder) as lock:
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
        started = _write_commands(run, run.folder, place, supervised=True)
        _require_programs(started)
        _clear_earlier_try(run)
        (run.folder / "logs").mkdir(exist_ok=True)
        for line in run.command.splitlines():
            say(line)
        task = Task(
            folder=str(run.folder),
            commands=started,
            working_directory=str(project_root()),
            ranks=run.config.ranks,
            silence=silence,
            stall=stall,
        )
        interrupted = _follow(task, say, lock)
        if run.status != "done" and run.failure is None:  # the supervisor itself was killed
            _wait_for_ranks(run)
            write_json(run.folder / "FAILED", {"rank": None, "step": None, "reason": "the supervisor was killed"})
        if isinstance(say, LiveView):
            say.close()
    if run.status == "done":
        return run
    if interrupted:
        raise KeyboardInterrupt(f"{run.name} was stopped: {_goes_on(run)}")
    raise RunFailed(_why(run))


def _require_startable(run: Run, place: Place | None, say: Say) -> None:
    """Refuse what the run folder cannot decide by itself, or what could only fail later. Raises `UserError`."""
    if run.written_config.trust_remote_code and not run.trust_remote_code:
        raise UserError(
            f"{shown(run.folder)} asks to run code that comes with its model: read that code, and give "
            "--trust-remote-code if you trust it"
        )
    asked = read_json(run.folder / HOSTS, Hosts)
    if "none" in (place and place.launcher, asked and asked["launcher"]):
        lines = shown(run.folder / "command.txt")
        raise UserError(f"{run.name} waits to be started on its hosts: give each its line of {lines}")
    if place is None and asked is not None:
        hosts = one_line(", ".join(asked["hosts"]), 100)
        raise UserError(
            f"{run.name} was prepared for the hosts {hosts}, and a run folder does not decide where commands run: name "
            "them again with --hostfile"
        )
    _require_place(run.config, place)
    require_no_links(run)
    require_as_made(run.folder)
    resume_point(run)
    _require_sound_deepspeed(run, say)
    if place is None and not run.on_gpu:
        preflight.warn_of_cores(run.config, say)


def _goes_on(run: Run) -> str:
    """What the same command will do with an interrupted run."""
    try:
        checkpoint = resume_point(run)
    except UserError as error:
        return str(error)
    if checkpoint is None:
        return "the same command starts it from the beginning (--resumable lets a run resume)"
    return f"the same command resumes from {checkpoint.name}"


def _why(run: Run) -> str:
    failure = run.failure
    rank = failure["rank"]
    where = "" if rank is None else f" on rank {rank}, step {failure['step']}"
    log = run.folder / "logs" / ("launcher.log" if rank is None else f"rank{rank}.log")
    return f"{run.name} failed{where}: {failure['reason']} (see {shown(log)})"


def _require_sound_deepspeed(run: Run, say: Say) -> None:
    """Refuse a `deepspeed.json`, which may have been edited, that would fail or not do what it says."""
    if (config := run.deepspeed) is None:
        return
    findings = lint(config, ranks=run.config.ranks)
    if errors := [finding for finding in findings if finding.severity == "error"]:
        said = "; ".join(f"{finding.key} {finding.message}" for finding in errors)
        raise UserError(f"{shown(run.folder / 'deepspeed.json')} cannot be trained with: {said}")
    require_contained(run)
    for finding in findings:
        say(f"deepspeed.json: {finding}")


def _require_programs(started: Sequence[Command]) -> None:
    """Refuse to start a program that is not there. Raises `UserError`."""
    for program in {command.words[0] for command in started}:
        if shutil.which(program, path=operators.build_environment()["PATH"]) is None:
            raise UserError(f"there is no {program} in this environment: launchers/setup.sh installs what is missing")


def _clear_earlier_try(run: Run) -> None:
    """What an unfinished run left must not be taken for the new one's; with a checkpoint to resume from, all stays."""
    (run.folder / "FAILED").unlink(missing_ok=True)
    clear(run.folder)
    if resume_point(run):
        return
    for name in ("metrics.jsonl", "memory.json"):
        (run.folder / name).unlink(missing_ok=True)
    for folder in (run.folder / "logs", run.folder / "tensorboard", *run.checkpoints):  # checkpoints without weights
        shutil.rmtree(folder, ignore_errors=True)


def _follow(task: Task, say: Say, lock: int) -> bool:
    """Let a supervisor run `task`, and pass on what it says, until it is gone; returns whether SIGINT stopped it.

    It holds `lock` (a file descriptor) as well, so that nothing can replace the folder under a live run.
    """
    operators.remove_stale_locks(operators.extensions_folder())
    stop: list[int] = []
    old = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                old[number] = signal.signal(number, lambda number, _: stop.append(number))
    supervisor = subprocess.Popen(
        processes.python("-m", "minisft.supervisor", task.to_json()),
        # The environment of this interpreter, even if nobody activated it.
        env=processes.environment() | operators.build_environment(),
        pass_fds=[lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(supervisor.stdout, lines), daemon=True).start()
    parent = os.getppid() if _ends_with_parent() else None
    asked = False
    try:
        while True:
            with suppress(queue.Empty):
                if (line := lines.get(timeout=TICK)) is None:
                    break
                say(line)
            if isinstance(say, LiveView):
                say.tick()
            if not asked and (stop or parent not in (None, os.getppid())):
                why = f"stopped by {signal.Signals(stop[0]).name}" if stop else "stopped because its parent is gone"
                with suppress(OSError):
                    supervisor.stdin.write(f"{why}\n")
                    supervisor.stdin.flush()
                asked = True
        supervisor.wait()
    finally:
        with suppress(OSError):
            supervisor.stdin.close()  # whatever happened here: it ends everything now
        for number, handler in old.items():
            signal.signal(number, handler)
    return stop[:1] == [signal.SIGINT]


def _ends_with_parent() -> bool:
    """Whether nobody else would stop this process when the one that started it is gone, such as a notebook's kernel.

    A terminal says SIGHUP, unless told otherwise (`disown`); `nohup` ignores it, and who leads a session (`setsid`)
    means to stay.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or os.getsid(0) == os.getpid():
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _wait_for_ranks(run: Run) -> None:
    """The ranks notice by themselves that their supervisor is gone; see to it that they do."""
    import psutil

    here = [sign.pid for sign in read_signs(run.folder) if is_here(sign.host)]
    ranks = []
    for pid in here:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if str(run.folder) in process.cmdline() or shown(run.folder) in process.cmdline():
                ranks.append(process)
    for process in psutil.wait_procs(ranks, timeout=3)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ranks, timeout=3)


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Hold a run for this process; the kernel lets go of the lock however the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(lock_of(folder)) as lock:
        if not try_lock(lock):
            raise UserError(f"{folder.name} is being trained right now: wait for it, or give another --name")
        yield lock.fileno()
