"""From a `RunConfig` to a prepared run folder, to one exact command, to a finished run.

    run = prepare(RunConfig.course("zero2"))
    launch(run)

Everything that can be wrong with the input is found in `prepare`, before any process starts.
"""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minisft import assets, operators, preflight
from minisft.checkpoints import latest_resumable
from minisft.errors import UserError
from minisft.ledger import Ledger
from minisft.lint import lint
from minisft.runs import Run, RunConfig, outputs_root, project_root, write_json
from minisft.tokens import HuggingFaceTokenizer
from minisft.training_data import write_data
from minisft.zero_config import deepspeed_config, offloads

Say = Callable[[str], None]
SAY = "[minisft] "  # what a worker wants the person to see; its other output goes to the log alone


class RunFailed(RuntimeError):
    """A run that started and did not finish. The message names the rank, the reason and the log."""


# --- preparing ---------------------------------------------------------------------------------------------


def prepare(config: RunConfig, *, overwrite: bool = False, say: Say = print) -> Run:
    """Make the run folder: data split and encoded, the DeepSpeed configuration, and the command.

    A finished run with the same settings is returned as it is, and so is an unfinished one that can go on from a
    checkpoint; without one it is prepared afresh. Any other run of this name is only replaced with `overwrite`.
    The folder appears whole, by one rename. Raises `UserError`.
    """
    folder = outputs_root() / "model" / config.name
    with _only_one(folder):
        if (folder / "run.json").exists() and not overwrite:
            old = Run(folder)
            if old.config != config and (old.status == "done" or old.checkpoints):
                raise UserError(
                    f"{_shown(folder)} holds a run with other settings ({_difference(old.config, config)}): "
                    f"{_why_not_resumed(old.config, config)}give this run another --name, or replace the old one with "
                    "--overwrite"
                )
            if old.config == config and old.status == "done":
                return old
            if old.config == config and (checkpoint := latest_resumable(old)):
                say(f"{config.name} was interrupted: it goes on from {checkpoint.name}")
                return old
        scratch = folder.with_name(f".{folder.name}.preparing")
        try:
            return _prepare(config, folder, scratch, say)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _prepare(config: RunConfig, folder: Path, scratch: Path, say: Say) -> Run:
    model = assets.find_model(config.model, say)
    tokenizer = HuggingFaceTokenizer(model.path, config.template)
    architecture = preflight.model_config(model.path, config.trust_remote_code)
    precision, on_gpu = preflight.resolve_precision(config.precision)
    shapes = assets.parameter_shapes(model.path)
    source = assets.find_data(config.data, say).path

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    ledger = Ledger()
    rows = write_data(config, source, tokenizer, scratch / "data", ledger)
    parameters = sum(map(math.prod, shapes.values()))
    preflight.require_fit(config, architecture, rows)
    preflight.require_space(config, rows, parameters)
    preflight.warn_of_memory(config, architecture, precision, on_gpu, say)
    if offloads(config.strategy) and not on_gpu:
        say("Without a GPU everything is in main memory already: offloading works here, and saves nothing")
    write_json(scratch / "ledger.json", ledger.to_dict())
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
    (scratch / "command.txt").write_text(shlex.join(command_line(config, folder)) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return Run(folder)


def command_line(config: RunConfig, folder: Path) -> list[str]:
    """The command that trains the run in `folder`, as an argument list. Every start gets a free port."""
    run = _shown(folder)
    port = str(_free_port())
    ranks = str(config.ranks)
    if config.strategy == "vanilla":
        return ["python", "-m", "minisft.train", run]
    if config.strategy == "ddp":
        return [
            "torchrun",
            "--nproc_per_node",
            ranks,
            "--master_port",
            port,
            "--module",
            "minisft.train",
            run,
        ]
    # An explicit empty hostfile keeps DeepSpeed on this machine, whatever /job/hostfile may hold.
    return [
        *("deepspeed", "--hostfile", "", "--num_accelerators", ranks, "--master_port", port),
        *("--module", "minisft.train", run),
    ]


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


def _shown(path: Path) -> str:
    """A path as a person types it: relative to the project where it lies inside."""
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- running -----------------------------------------------------------------------------------------------


def launch(run: Run, say: Say = print) -> Run:
    """Run the prepared command to its end; returns when it is done.

    The processes live in a session of their own and are all ended if this one is interrupted or loses its
    parent. Success is exit code 0 and the `DONE` marker. Raises `RunFailed`, or `UserError` if the run is live.
    """
    if run.status == "done":
        say(f"{run.name} is trained already, with exactly these settings (--overwrite trains it again)")
        return run
    _require_sound_deepspeed(run, say)
    with _only_one(run.folder) as lock:
        _clear_earlier_try(run)
        command = command_line(run.config, run.folder)
        (run.folder / "command.txt").write_text(shlex.join(command) + "\n")
        (run.folder / "logs").mkdir(exist_ok=True)
        say(run.command)
        code, reason = _supervise(command, run.folder / "logs" / "launcher.log", say, lock)
    if code == 0 and run.status == "done":
        return run
    if run.failure is None:
        write_json(run.folder / "FAILED", {"rank": None, "step": None, "reason": reason or f"exit code {code}"})
    failure = run.failure
    where = "" if failure["rank"] is None else f" on rank {failure['rank']}, step {failure['step']}"
    log = run.folder / "logs" / ("launcher.log" if failure["rank"] is None else f"rank{failure['rank']}.log")
    raise RunFailed(f"{run.name} failed{where}: {failure['reason']} (see {_shown(log)})")


def _require_sound_deepspeed(run: Run, say: Say) -> None:
    """Refuse a `deepspeed.json`, which may have been edited, that would fail or not do what it says."""
    if (config := run.deepspeed) is None:
        return
    findings = lint(config, ranks=run.config.ranks)
    if errors := [finding for finding in findings if finding.severity == "error"]:
        said = "; ".join(f"{finding.key} {finding.message}" for finding in errors)
        raise UserError(f"{_shown(run.folder / 'deepspeed.json')} cannot be trained with: {said}")
    for finding in findings:
        say(f"deepspeed.json: {finding}")


def _clear_earlier_try(run: Run) -> None:
    """What an unfinished run left must not be taken for the new one's; with a checkpoint to go on from, all stays."""
    (run.folder / "FAILED").unlink(missing_ok=True)
    if latest_resumable(run):
        return
    for name in ("metrics.jsonl", "memory.json"):
        (run.folder / name).unlink(missing_ok=True)
    for folder in (run.folder / "logs", run.folder / "tensorboard", *run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)


def _supervise(command: list[str], log: Path, say: Say, lock: int) -> tuple[int, str]:
    """Run `command`, its output to `log`; returns its exit code and, if it was stopped, why.

    Should this process be killed outright, the workers notice and end, and the launcher holds `lock` (a file
    descriptor) until it is gone, so that nothing can replace the folder under a live run.
    """
    operators.remove_stale_locks(operators.extensions_folder())
    # The environment of this interpreter, even if nobody activated it.
    environment = os.environ | operators.build_environment() | {"PYTHONUNBUFFERED": "1"}
    parent = os.getppid()
    stop: list[int] = []
    old = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                old[number] = signal.signal(number, lambda number, _: stop.append(number))
    process = subprocess.Popen(
        command,
        cwd=project_root(),
        env=environment | {"MINISFT_SUPERVISOR": str(os.getpid())},
        pass_fds=[lock],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_copy_output, args=(process.stdout, log, say), daemon=True)
    reader.start()
    reason = ""
    family: set[Any] = set()
    try:
        while process.poll() is None:
            family |= _below(process)
            if stop:
                reason = f"stopped by {signal.Signals(stop[0]).name}"
            elif os.getppid() != parent:
                reason = "stopped because the process that started it is gone"
            if reason:
                break
            time.sleep(0.5)  # looking at the process table has its price, and the workers need the cores
    finally:
        _end_all(process, family | _below(process))
        for number, handler in old.items():
            signal.signal(number, handler)
    reader.join(timeout=5)
    return process.returncode, reason


def _copy_output(stream: Any, log: Path, say: Say) -> None:
    with log.open("wb", buffering=0) as out:
        for line in stream:
            with suppress(OSError):  # a full disk must not stop the reading, or the workers would wait forever
                out.write(line)
            text = line.decode(errors="replace").rstrip()
            if text.startswith(SAY):
                say(text.removeprefix(SAY))


def _below(process: subprocess.Popen) -> set[Any]:
    """Every process that a launcher has started, at any depth."""
    import psutil

    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _end_all(process: subprocess.Popen, family: set[Any]) -> None:
    """End a launcher and everything it has started: first politely, then surely.

    `family` was collected while it lived: a launcher that dies takes the way to its children with it.
    """
    import psutil

    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    left = psutil.wait_procs(family, timeout=0.5)[1]
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=3)


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Hold a run for this process; the kernel lets go of the lock however the process ends.

    The lock lies beside the folder, because preparing a run anew replaces the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder.name} is being trained right now: wait for it, or give another --name") from None
        yield lock.fileno()
