"""Writes checkpoints atomically, verifies them before use, and removes those not needed.

A checkpoint is written into `.saving/` and gets its name, by one rename, when all of it is on disk;
its `manifest.json` lists every file with size and checksum. So, whatever kills a run, a folder
`checkpoint-N` is always complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from minisft.checksums import digest
from minisft.errors import UserError
from minisft.files import is_inside, read_json, read_text, remove_all, write_json, written_whole
from minisft.run.folder import FILES, MANIFEST, Run, checkpoint_step, manifest_of
from minisft.text import one_line
from minisft.zero.strategies import strategy_named

SCRATCH = ".saving"
# Incomplete checkpoints: their saving or removal was interrupted.
HALVES = (f"{SCRATCH}/checkpoint-*", ".removed-checkpoint-*/*")
MADE_AGAIN = (  # the files of a run folder that preparing and starting write again
    *(*FILES, "hostfile", "environment", "job.sbatch", "slurm-hostfile", ".minisft-*", "tensorboard/events.*"),
    *("data/made_of.json", "data/*.arrow", "data/test.jsonl", "ranks/*.json", "ranks/.minisft-*"),
    *("logs/*.log", "logs/progress.txt"),
)
UNSAFE = ("training_args.bin",)  # a pickle, and not needed: run.json has the same settings


def scratch_folder(run: Run) -> Path:
    """Return the folder in which checkpoints are written."""
    return run.folder / SCRATCH


def discard_unfinished(run: Run) -> None:
    """Remove what an interrupted save or removal left; this also frees space on a full disk."""
    remove_all(scratch_folder(run))
    for folder in run.folder.glob(".removed-checkpoint-*"):
        remove_all(folder)


def seal(run: Run, folder: Path, about: dict[str, Any]) -> Path:
    """Write the manifest of a checkpoint in `.saving/`, move it into the run, return its path.

    `about` is added to the manifest. Everything is flushed to disk before the rename. Raises
    `UserError` if the run already has this checkpoint.
    """
    for name in UNSAFE:
        (folder / name).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p, sync=True)} for p in files}
    write_json(folder / MANIFEST, {**about, "files": digests})
    _sync(folder / MANIFEST)
    _sync(folder)
    checkpoint = run.folder / folder.name
    if checkpoint.exists():
        raise UserError(f"{checkpoint} exists already: move it away and start the run again")
    folder.rename(checkpoint)
    folder.parent.rmdir()
    _sync(run.folder)
    return checkpoint


def rotate(run: Run, keep: int | None) -> None:
    """Remove all checkpoints except the last `keep` and the best one (lowest test loss).

    `None` keeps all. A checkpoint without a manifest, with a damaged one, or with that of another
    run is never removed, and does not count.
    """
    if keep is None:
        return
    own = [folder for folder in run.checkpoints if _is_own(run, folder)]
    for folder in set(own[:-keep]) - {run.best_checkpoint}:
        remove(folder)


def _is_own(run: Run, checkpoint: Path) -> bool:
    with suppress(UserError):  # a damaged manifest: this checkpoint may be the best
        manifest = manifest_of(checkpoint)
        return manifest is not None and run.wrote(manifest)
    return False


def remove(folder: Path) -> None:
    """Rename a checkpoint, then remove it: no partial `checkpoint-N` is ever visible."""
    if folder.exists():
        doomed = folder.with_name(f".removed-{folder.name}")
        remove_all(doomed)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def latest_resumable(run: Run) -> Path | None:
    """Return the last checkpoint that has optimizer states, or None.

    Raises `UserError` if a manifest is damaged, or if a later checkpoint exists that cannot be
    resumed.
    """
    latest = None
    advice = "rerun the same command to resume from what is left, or replace the run with --overwrite"
    for checkpoint in run.checkpoints:
        try:
            is_resumable = (manifest_of(checkpoint) or {}).get("resumable")
        except UserError as error:
            raise UserError(f"{error}; move {checkpoint} away and {advice}") from error
        if is_resumable:
            latest = checkpoint
        elif latest is not None and any(checkpoint.iterdir()):  # training would write a checkpoint of this name
            raise UserError(
                f"{checkpoint} is later than {latest.name} and cannot be resumed: move it away and {advice}"
            )
    return latest


def resume_point(run: Run) -> Path | None:
    """Return the checkpoint to resume from; None if a start from the beginning loses nothing.

    Raises `UserError` if there is no such checkpoint, but a file that may hold weights.
    """
    if (checkpoint := latest_resumable(run)) is not None:
        return checkpoint
    if (valuable := something_to_lose(run.folder)) is not None:
        raise UserError(
            f"{run.folder} holds {valuable.relative_to(run.folder)}, which may be weights, and no checkpoint to "
            "resume from: start it from the beginning with --restart (or --overwrite), give this run another --name, "
            "or start from its weights with --model"
        )
    return None


def something_to_lose(folder: Path) -> Path | None:
    """Return the first file of a run folder that preparing would not write again, or None.

    It belongs to a checkpoint or to the user. Raises `UserError` for a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}) and may hold weights: make it readable")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            file = Path(parent) / name
            if not is_made_again(file.relative_to(folder)):
                return file
    return None


def is_made_again(file: Path) -> bool:
    """Return whether preparing or starting rewrites `file`, a path relative to the run folder."""
    if any(fnmatchcase(str(file), half) for half in HALVES):
        return True
    patterns = (pattern.split("/") for pattern in MADE_AGAIN)
    return any(len(one) == len(file.parts) and all(map(fnmatchcase, file.parts, one)) for one in patterns)


def verify(run: Run, folder: Path) -> None:
    """Raise `UserError` unless a checkpoint is unchanged and has all files that a resume needs."""
    if problem := checkpoint_damage(folder) or _resume_problem(run, folder):
        earlier = [c for c in run.checkpoints if checkpoint_step(c) < checkpoint_step(folder)]
        then = f"it then resumes from {earlier[-1].name}" if earlier else "it then starts from the beginning"
        raise UserError(f"{folder.name} is damaged: {problem}; remove {folder} and start the run again, {then}")


def _resume_problem(run: Run, folder: Path) -> str:
    """Say which file of a resumable checkpoint is missing, or is one too many; "" if all is well.

    transformers silently skips states that are missing, so they are checked here.
    """
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    if not run.wrote(manifest_of(folder) or {}):
        return "it was written by another run"
    ranks = run.config.ranks
    wanted = [r"trainer_state\.json", r"scheduler\.pt"]
    if run.deepspeed is None:
        wanted += [r"optimizer\.pt"]
    elif strategy_named(run.config.strategy).stage:
        wanted += [rf"global_step\d+/.*_rank_{rank}_.*optim_states\.pt" for rank in range(ranks)]
    else:
        wanted += [r"global_step\d+/.*model_states\.pt"]
    wanted += [r"rng_state\.pth"] if ranks == 1 else [rf"rng_state_{rank}\.pth" for rank in range(ranks)]
    latest = read_text(folder / "latest") if run.deepspeed is not None else None
    if latest is not None and not any(name.startswith(f"{latest.strip()}/") for name in present):
        return "latest names states that are not in it"
    for pattern in wanted:
        if not any(re.fullmatch(pattern, name) for name in present):
            return f"a file of its optimizer, scheduler or random states is missing ({pattern})"
    if (state := read_json(folder / "trainer_state.json", TrainerState)).global_step != checkpoint_step(folder):
        return f"its trainer_state.json is from step {state.global_step}"
    return ""


@dataclass(frozen=True)
class TrainerState:
    """From transformers' `trainer_state.json`: the step, and the total number of steps."""

    global_step: int
    max_steps: int


def is_trained(folder: Path) -> bool:
    """Return whether the checkpoint is from the last step, so that only `DONE` is missing."""
    state = read_json(folder / "trainer_state.json", TrainerState)
    return state is not None and state.global_step >= state.max_steps


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is called as a run's checkpoints are, and has a manifest."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None and (folder / MANIFEST).is_file()


def checkpoint_damage(folder: Path, only: tuple[str, ...] = ("",)) -> str:
    """Describe the first file that differs from the manifest, or is not in it; "" if none is.

    Only files whose names end in one of `only` are compared.
    """
    try:
        manifest = manifest_of(folder)
    except UserError as error:
        return str(error)
    if manifest is None:
        return f"it has no {MANIFEST}"
    if "files" not in manifest:
        return f"{MANIFEST} does not name its files"
    present = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    if unlisted := sorted(name for name in {*present} - {MANIFEST, *manifest["files"]} if name.endswith(only)):
        return f"{MANIFEST} does not name {one_line(unlisted[0])}"
    for name, expected in manifest["files"].items():
        file = folder / name
        if not name.endswith(only):
            continue
        if not is_inside(file, folder):
            return f"{MANIFEST} names a file outside of the checkpoint, {name}"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if digest(file) != expected["sha256"]:
            return f"{name} differs from its checksum"
    return ""


def cut_metrics(file: Path, step: int) -> None:
    """Cut `metrics.jsonl` after `step`, so that a resumed run does not write a step twice.

    Raises `UserError` if another line than the last one cannot be read.
    """
    lines = []
    written = (read_text(file) or "").split("\n")
    for number, line in enumerate(written, 1):
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            if number < len(written):  # else it was half written when the run was killed
                raise UserError(
                    f"{file} line {number} is not JSON of a step: repair the line, or move the file away"
                ) from None
    if lines or file.exists():
        with written_whole(file) as stream:
            stream.writelines(lines)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
