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

from minisft import assets, operators, preflight
from minisft.checkpoints import latest_resumable
from minisft.commands import Command, commands, require_deepspeed, shown, write_place
from minisft.errors import UserError
from minisft.files import read_json, try_lock, write_json
from minisft.hosts import Place, is_here
from minisft.ledger import Ledger
from minisft.lint import lint
from minisft.live import LiveView, in_notebook
from minisft.pulse import SILENCE, STALL, clear, read_signs
from minisft.runs import Run, RunConfig, all_runs, lock_of, outputs_root, project_root
from minisft.supervisor import Task
from minisft.tokens import HuggingFaceTokenizer
from minisft.training_data import made_of, remember, take_over, write_data
from minisft.zero_config import deepspeed_config, offloads

Say = Callable[[str], None]
HOSTS = "hosts.json"  # of a run folder: where it takes place
TICK = 0.25  # seconds between two looks for an interrupt


class RunFailed(RuntimeError):
    """A run that started and did not finish. The message names the rank, the reason and the log."""


# --- preparing ---------------------------------------------------------------------------------------------


def prepare(config: RunConfig, *, place: Place | None = None, overwrite: bool = False, say: Say = print) -> Run:
    """Make the run folder: data split and encoded, the DeepSpeed configuration, and the command.

    A finished run with the same settings is returned as it is, and so is an unfinished one that can go on from a
    checkpoint; without one it is prepared afresh. Any other run of this name is only replaced with `overwrite`.
    The folder appears whole, by one rename. `place` are the hosts to run on, if not this machine alone; they may be
    others when a run goes on. Paths among the settings become absolute: `rows.json` elsewhere is another file. Raises
    `UserError`.
    """
    _require_place(config, place)
    config = _settled(config)
    folder = outputs_root() / "model" / config.name
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{shown(folder)} is a link to {folder.readlink()}, which is not there: mend it, or remove it")
    with _only_one(folder):
        if (folder / "run.json").exists() and not overwrite:
            old = Run(folder)
            before = _settled(old.config)
            if before != config and (old.status == "done" or old.checkpoints):
                raise UserError(
                    f"{shown(folder)} holds a run with other settings ({_difference(before, config)}): "
                    f"{_why_not_resumed(before, config)}give this run another --name, or replace the old one with "
                    "--overwrite"
                )
            if before == config and old.status == "done":
                return old
            if before == config and (checkpoint := latest_resumable(old)):
                say(f"{config.name} was interrupted: it goes on from {checkpoint.name}")
                _write_commands(config, folder, folder, place)
                return old
        elif not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{shown(folder)} is there and holds no run: move it away, give this run another --name, or replace it "
                "with --overwrite"
            )
        scratch = _beside(folder, "preparing")
        try:
            return _prepare(config, place, folder, scratch, say)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _prepare(config: RunConfig, place: Place | None, folder: Path, scratch: Path, say: Say) -> Run:
    model = assets.find_model(config.model, say)
    tokenizer = HuggingFaceTokenizer(model.path, config.template)
    architecture = preflight.model_config(model.path, config.trust_remote_code)
    precision, on_gpu = preflight.resolve_precision(config.precision)
    shapes = assets.parameter_shapes(model.path)
    source = assets.find_data(config.data, say).path

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
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
    _write_commands(config, folder, scratch, place)
    _replace(folder, scratch)
    return Run(folder)


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
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _rows(config: RunConfig, source: Path, model: Path, tokenizer: HuggingFaceTokenizer, scratch: Path) -> int:
    """Write the data and its ledger into `scratch`, or copy them from a run that has the same; returns how many rows.

    Reading ShareGPT takes seconds, and the strategies that are compared want the same of it.
    """
    wanted = made_of(config, source, model)
    rows = take_over(wanted, [run.folder for run in all_runs()], scratch / "data") if source.is_file() else None
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


def _write_commands(
    config: RunConfig, folder: Path, into: Path, place: Place | None, supervised: bool = False
) -> list[Command]:
    """Write what starts the run that lies, or will lie, in `folder`: command.txt, and what several hosts need."""
    found = commands(config, folder, place, supervised)
    (into / "command.txt").write_text("".join(f"{command}\n" for command in found))
    if place is None:
        (into / HOSTS).unlink(missing_ok=True)
    else:
        write_json(into / HOSTS, place.to_dict())
        write_place(into, place, supervised)
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
    if run.status == "done":
        (say or print)(f"{run.name} is trained already, with exactly these settings (--overwrite trains it again)")
        return run
    say = say or (LiveView(run) if in_notebook() else print)
    place = place or _place_of(run)
    _require_place(run.config, place)
    if place is not None and place.launcher == "none":
        raise UserError(
            f"{run.name} waits to be started on its hosts: give each its line of {shown(run.folder / 'command.txt')}"
        )
    _require_sound_deepspeed(run, say)
    if place is None and not run.on_gpu:
        preflight.warn_of_cores(run.config, say)
    with _only_one(run.folder) as lock:
        started = _write_commands(run.config, run.folder, run.folder, place, supervised=True)
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


def _goes_on(run: Run) -> str:
    if checkpoint := latest_resumable(run):
        return f"the same command goes on from {checkpoint.name}"
    return "the same command starts it anew (--resumable lets a run go on)"


def _place_of(run: Run) -> Place | None:
    found = read_json(run.folder / HOSTS)
    return None if found is None else Place.from_dict(found)


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
    for finding in findings:
        say(f"deepspeed.json: {finding}")


def _require_programs(started: Sequence[Command]) -> None:
    """Refuse to start a program that is not there. Raises `UserError`."""
    for program in {command.words[0] for command in started}:
        if shutil.which(program, path=operators.build_environment()["PATH"]) is None:
            raise UserError(f"there is no {program} in this environment: launchers/setup.sh installs what is missing")


def _clear_earlier_try(run: Run) -> None:
    """What an unfinished run left must not be taken for the new one's; with a checkpoint to go on from, all stays."""
    (run.folder / "FAILED").unlink(missing_ok=True)
    clear(run.folder)
    if latest_resumable(run):
        return
    for name in ("metrics.jsonl", "memory.json"):
        (run.folder / name).unlink(missing_ok=True)
    for folder in (run.folder / "logs", run.folder / "tensorboard", *run.checkpoints):
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
        [sys.executable, "-m", "minisft.supervisor", task.to_json()],
        # The environment of this interpreter, even if nobody activated it.
        env=os.environ | operators.build_environment(),
        pass_fds=[lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
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
                    print(why, file=supervisor.stdin, flush=True)
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
    with lock_of(folder).open("w") as lock:
        if not try_lock(lock):
            raise UserError(f"{folder.name} is being trained right now: wait for it, or give another --name")
        yield lock.fileno()
