"""Turns a `RunConfig` into a prepared run folder and one exact command.

    run = prepare(RunConfig.course("zero2"))

All errors in the input are found here, before any process starts.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from minisft.chat.registry import other_template
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.checksums import Digests
from minisft.data import download
from minisft.data.ledger import Ledger
from minisft.data.model_folder import OF_A_MODEL
from minisft.errors import UserError
from minisft.files import is_inside, remove_all, user_path, write_json, written_whole
from minisft.launch.changed_inputs import changed_inputs
from minisft.launch.commands import Command, commands, display_path, require_deepspeed, write_place
from minisft.launch.hosts import Place
from minisft.locks import locked_folder, open_lock, try_lock
from minisft.model.configs import model_config
from minisft.run.config import RunConfig
from minisft.run.folder import Run, all_runs, lock_file, outputs_root, require_own_files
from minisft.text import say
from minisft.training import preflight
from minisft.training.checkpoint_health import require_sound
from minisft.training.checkpoints import (
    checkpoint_damage,
    is_checkpoint,
    latest_resumable,
    resume_point,
    something_to_lose,
)
from minisft.training.dataset import (
    copy_known_rows,
    describe_rows,
    made_by_this_code,
    model_files,
    remember_rows,
    write_data,
)
from minisft.zero.strategies import deepspeed_config, strategy_named

Say = Callable[[str], None]
HOSTS = "hosts.json"  # file of a run folder: the hosts of the run and their launcher


def prepare(
    config: RunConfig,
    *,
    place: Place | None = None,
    overwrite: bool = False,
    restart: bool = False,
    say: Say = say,
) -> Run:
    """Make the run folder: the split and encoded data, the DeepSpeed configuration, the command.

    A run with the same settings is returned as it is if it is finished, or can be resumed from a
    checkpoint, and its model and data have not changed; an unfinished run without weights is
    prepared from the beginning. Any other run of this name is only replaced with `overwrite`, or
    with `restart` if it is unfinished, has the same settings and cannot be resumed: without one of
    the two, nothing that may hold weights is removed.

    The folder appears complete, by one rename, and all of this is decided while its lock is held.
    `place` names the hosts to run on, if not this machine alone; a resumed run may use other hosts.
    Paths in the settings become absolute, because `rows.json` in another folder is another file.
    Raises `UserError` for settings, data, a model or a place that cannot be trained with.
    """
    require_place(config, place)
    config = _settled(config)
    folder = outputs_root() / "model" / config.name
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{display_path(folder)} is a link to {folder.readlink()}, which does not exist: correct or remove it"
        )
    with only_one(folder):
        _put_back(folder, say)
        if not overwrite and (run := _existing(config, folder, place, restart, say)) is not None:
            return run
        if overwrite:
            _require_replaceable(folder)
        scratch = _beside(folder, "preparing")
        try:
            return _prepare(config, place, folder, scratch, say)
        finally:
            remove_all(scratch)


def _existing(config: RunConfig, folder: Path, place: Place | None, restart: bool, say: Say) -> Run | None:
    """Return the run in `folder` if it is done or resumable; None if it may be replaced."""
    if not (folder / "run.json").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{display_path(folder)} exists but is not a run folder: move it away, give this run another --name, "
                "or replace it with --overwrite"
            )
        return None
    run = Run(folder, config.trust_remote_code, place=place).as_it_is()
    before = _settled(run.config)
    for name in ("model", "data"):  # a relative path to an input that is gone by now
        if str(user_path(getattr(config, name)).absolute()) == getattr(before, name):
            config = replace(config, **{name: getattr(before, name)})
    if before != config:
        if run.status == "done" or something_to_lose(folder):
            raise UserError(
                f"{display_path(folder)} holds a run with other settings ({_difference(before, config)}): "
                f"{_why_not_resumed(before, config)}give this run another --name, or replace the old one with "
                "--overwrite"
            )
        return None
    is_done = run.status == "done"
    checkpoint = None
    if not is_done:
        checkpoint = latest_resumable(run) if restart else resume_point(run)
        if checkpoint is None:
            return None
    # Even with `restart`: that is for runs that cannot be resumed, and this one holds weights.
    if changed := changed_inputs(run):
        raise UserError(
            f"{display_path(folder)} holds {'a' if is_done else 'an interrupted'} run of the same settings, but "
            f"{changed} since: {'' if is_done else 'put the old one back to resume, '}give this run another --name, "
            "or replace the old one with --overwrite"
        )
    if checkpoint is None:
        _mention_other_code(run, say)
        return run
    require_own_files(run)
    _mention_other_code(run, say)
    say(f"{config.name} was interrupted: it resumes from {checkpoint.name}")
    write_commands(run, folder, place)
    return run


def _mention_other_code(run: Run, say: Say) -> None:
    if not made_by_this_code(run.folder):
        say(
            f"{run.name} keeps the rows that it was prepared with: the code or the libraries that make rows have "
            "changed since; --overwrite prepares it again"
        )


def _require_replaceable(folder: Path) -> None:
    """Raise `UserError` if `folder` is a link to a folder that is neither a run nor empty."""
    if folder.is_symlink() and not (folder / "run.json").is_file() and not _is_empty(folder):
        raise UserError(
            f"{display_path(folder)} is a link to {folder.readlink()}, which is not a run folder: remove the link, "
            "or give this run another --name"
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _prepare(config: RunConfig, place: Place | None, folder: Path, scratch: Path, say: Say) -> Run:
    model = download.find_model(config.model, say)
    source = download.find_data(config.data, say).path
    if source.is_dir() and is_inside(folder, source):
        raise UserError(f"{folder} would lie in the data folder {source} and be read as data: set MINISFT_OUTPUTS")
    for what, path in (("model", model.path), ("data", source)):
        if folder.exists() and is_inside(path, folder):
            raise UserError(
                f"the {what} {path} lies in the run folder that would be replaced, {display_path(folder)}: "
                "give this run another --name"
            )
    require_sound(model.path, trust_remote_code=config.trust_remote_code)
    if is_checkpoint(model.path) and (damage := checkpoint_damage(model.path, only=OF_A_MODEL)):
        raise UserError(f"the model in {model.path} is a damaged checkpoint: {damage}")
    tokenizer = HuggingFaceTokenizer(model.path, config.template)
    if remark := other_template(tokenizer):
        say(remark)
    architecture = model_config(model.path, config.trust_remote_code)
    precision, on_gpu = preflight.resolve_precision(config.precision)
    shapes = download.parameter_shapes(model.path)

    remove_all(scratch)
    scratch.mkdir(mode=0o700)  # conversations are personal
    rows = _rows(config, source, model.path, tokenizer, scratch, say)
    parameters = sum(map(math.prod, shapes.values()))
    preflight.require_fit(config, architecture, rows)
    preflight.require_space(config, rows, parameters)
    preflight.warn_of_memory(config, architecture, precision, on_gpu, say)
    if strategy_named(config.strategy).offloads and not on_gpu:
        say("Without a GPU everything is in main memory already: offloading works here but saves nothing")
    record = {
        "config": config.to_dict(),
        "model_folder": str(model.path.absolute()),
        "model_source": model.source,
        "precision": precision,
        "on_gpu": on_gpu,
        "model_files": model_files(model.path, Digests()),
        "versions": _versions(),
    }
    write_json(scratch / "run.json", record)
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
    write_commands(Run(scratch, config.trust_remote_code).as_it_is(), folder, place)
    _replace(folder, scratch)
    return Run(folder, config.trust_remote_code, place=place).as_it_is()


def _beside(folder: Path, what: str) -> Path:
    """Return a hidden folder on the run folder's disk; that folder may be a link."""
    real = folder.resolve()
    return real.with_name(f".{real.name}.{what}")


def _put_back(folder: Path, say: Say) -> None:
    """Undo a replacement that was killed halfway: give the earlier run its name again."""
    old = _beside(folder, "removed")
    is_free = not os.path.lexists(folder) or (not folder.is_symlink() and _is_empty(folder))
    if is_free and old.is_dir():
        old.rename(folder)  # an empty folder in its place is replaced
        say(f"replacing {folder.name} was interrupted: the earlier run is back")
    elif old.is_file() or (old.is_dir() and not _is_empty(old)):
        raise UserError(
            f"{display_path(old)} holds an earlier run, which an interrupted replacement has left there: remove it, "
            "or move it away"
        )


def _replace(folder: Path, new: Path) -> None:
    """Replace `folder` by `new` with renames only: an interruption leaves no partial folder."""
    real, old, discarded = folder.resolve(), _beside(folder, "removed"), _beside(folder, "discarded")

    def discard_old() -> None:
        remove_all(discarded)
        if os.path.lexists(old):
            old.rename(discarded)  # renamed first, so that `_put_back` never finds it half removed
            remove_all(discarded)

    discard_old()
    if real.exists():
        real.rename(old)
    new.rename(real)
    discard_old()


def _rows(
    config: RunConfig, source: Path, model: Path, tokenizer: HuggingFaceTokenizer, scratch: Path, say: Say
) -> int:
    """Write the data and its ledger into `scratch`; return the number of training rows.

    If another run has the same rows, they are copied: reading ShareGPT takes seconds, and all
    strategies of a comparison need the same rows.
    """
    wanted = describe_rows(config, source, model, Digests())
    rows = copy_known_rows(wanted, [run.folder for run in all_runs()], scratch / "data")
    if rows is None:
        ledger = Ledger()
        rows = write_data(config, source, tokenizer, scratch / "data", ledger)
        for problem in ledger.lost:
            say(f"lost: {problem}")
        for note in ledger.notes:
            say(note)
        write_json(scratch / "ledger.json", ledger.to_dict())
        remember_rows(wanted, rows, scratch / "data")
    return rows


def _settled(config: RunConfig) -> RunConfig:
    return replace(config, model=download.absolute_source(config.model), data=download.absolute_source(config.data))


def require_place(config: RunConfig, place: Place | None) -> None:
    """Raise `UserError` if the run cannot use these hosts, or their ranks differ from its own."""
    if place is None:
        return
    require_deepspeed(config)
    if place.ranks != config.ranks:
        raise UserError(f"the hosts take {place.ranks} ranks, but the settings have {config.ranks}: make them equal")


def write_commands(run: Run, folder: Path, place: Place | None, supervised: str = "") -> list[Command]:
    """Write `command.txt` and, for several hosts, the files that they need; return the commands.

    `folder` is the run's final folder, which is not yet `run.folder` while the run is being
    prepared.
    """
    host_commands = commands(run.config, folder, place, supervised, run.prepared)
    with written_whole(run.folder / "command.txt", private=True) as stream:
        stream.writelines(f"{command}\n" for command in host_commands)
    if place is None:
        (run.folder / HOSTS).unlink(missing_ok=True)
    else:
        write_json(run.folder / HOSTS, place.to_dict())
        write_place(run.folder, place, supervised)
    return host_commands


def _why_not_resumed(old: RunConfig, new: RunConfig) -> str:
    if (old.strategy, old.ranks) == (new.strategy, new.ranks):
        return ""
    return (
        f"its checkpoints hold the optimizer states as {old.strategy} lays them out over {old.ranks} rank(s), which no "
        "other strategy or number of ranks can read; keep the old ones, start from its weights (--model "
        "outputs/model/<run>/checkpoint-N), "
    )


def _difference(old: RunConfig, new: RunConfig) -> str:
    a, b = old.to_dict(), new.to_dict()
    return ", ".join(f"{key.replace('_', ' ')} {a[key]} -> {b[key]}" for key in a if a[key] != b[key])


def _versions() -> dict[str, str]:
    packages = ("minisft", "torch", "transformers", "accelerate", "deepspeed", "datasets")
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: version(name) for name in packages}


@contextmanager
def only_one(folder: Path) -> Iterator[list[int]]:
    """Lock a run and yield the locks' file descriptors. Raises `UserError` if it is locked.

    The kernel releases the locks however the process ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(lock_file(folder)) as lock, locked_folder(folder) as folder_lock:
        if folder_lock is False or not try_lock(lock):
            raise UserError(f"{folder.name} is being trained right now: wait for it, or give another --name")
        yield [lock.fileno(), *([] if folder_lock is None else [folder_lock])]
