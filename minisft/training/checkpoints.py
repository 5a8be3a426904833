"""Checkpoints that are whole or not there, checked before they are trusted, and few enough to fit the disk.

A checkpoint is written into `.saving/` and gets its name, by one rename, when all of it is on the disk; its
`manifest.json` names every file with size and checksum. So whatever kills a run, `checkpoint-N` is never half a one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from minisft.checksums import digest
from minisft.errors import UserError
from minisft.files import is_inside, read_json, read_text, remove_all, write_json, written_whole
from minisft.run.folder import MANIFEST, Run, checkpoint_step, manifest_of
from minisft.zero.strategies import strategy_named

SCRATCH = ".saving"
HALVES = (f"{SCRATCH}/checkpoint-*", ".removed-checkpoint-*/*")  # of checkpoints that were being saved or removed
MADE_AGAIN = (  # of a run folder: what preparing and starting write
    *("run.json", "deepspeed.json", "command.txt", "hosts.json", "hostfile", "environment", "job.sbatch"),
    *("slurm-hostfile", "ledger.json", "metrics.jsonl", "memory.json", "DONE", "FAILED", ".minisft-*"),
    *("data/made_of.json", "data/*.arrow", "data/test.jsonl", "logs/*.log", "ranks/*.json", "ranks/.minisft-*"),
    "tensorboard/events.*",
)
UNSAFE = ("training_args.bin",)  # a pickle that nobody needs: run.json says the same


def scratch_folder(run: Run) -> Path:
    """Where a checkpoint is while it is being written."""
    return run.folder / SCRATCH


def discard_unfinished(run: Run) -> None:
    """Remove what an interrupted save or removal left; it also frees the space that a full disk lacks."""
    remove_all(scratch_folder(run))
    for folder in run.folder.glob(".removed-checkpoint-*"):
        remove_all(folder)


def seal(run: Run, folder: Path, about: dict[str, Any]) -> Path:
    """Write the manifest of a checkpoint in `.saving/` and give it its place in the run; returns that place."""
    for name in UNSAFE:
        (folder / name).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p, sync=True)} for p in files}
    write_json(folder / MANIFEST, {**about, "files": digests})
    _sync(folder / MANIFEST)
    _sync(folder)
    place = run.folder / folder.name
    if place.exists():
        raise UserError(f"{place} exists already: move it away and start the run again")
    folder.rename(place)
    folder.parent.rmdir()
    _sync(run.folder)
    return place


def rotate(run: Run, keep: int | None) -> None:
    """Remove all checkpoints but the last `keep`, the best (lowest test loss), and those without a sound manifest."""
    if keep is None:
        return
    kept = {*run.checkpoints[-keep:], run.best_checkpoint}
    for folder in set(run.checkpoints) - kept:
        with suppress(UserError):  # a damaged one may be the best
            if manifest_of(folder) is not None:
                remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that nobody sees half of it."""
    if folder.exists():
        doomed = folder.with_name(f".removed-{folder.name}")
        remove_all(doomed)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def latest_resumable(run: Run) -> Path | None:
    """The last checkpoint that has optimizer states, or None. Raises `UserError` if any checkpoint is damaged."""
    found = None
    advice = "rerun the same command to resume from what is left, or replace the run with --overwrite"
    for checkpoint in run.checkpoints:
        try:
            is_resumable = (manifest_of(checkpoint) or {}).get("resumable")
        except UserError as error:
            raise UserError(f"{error}; move {checkpoint} away and {advice}") from error
        if is_resumable:
            found = checkpoint
        elif found is not None and any(checkpoint.iterdir()):  # training would write another one in its place
            raise UserError(f"{checkpoint} is later than {found.name} and cannot be resumed: move it away and {advice}")
    return found


def resume_point(run: Run) -> Path | None:
    """The checkpoint to resume from; None if the folder holds nothing to lose, so that the run can start anywhere.

    Raises `UserError` where it holds something and no checkpoint to resume from: only `--overwrite` removes that.
    """
    if (checkpoint := latest_resumable(run)) is not None:
        return checkpoint
    if (kept := something_to_lose(run.folder)) is not None:
        raise UserError(
            f"{run.folder} holds {kept.relative_to(run.folder)}, which may be weights, and no checkpoint to "
            "resume from: start it from the beginning with --restart (or --overwrite), give this run another --name, "
            "or start from its weights with --model"
        )
    return None


def something_to_lose(folder: Path) -> Path | None:
    """The first file in a run folder that preparing would not make again: of a checkpoint, or somebody's own."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}), and may hold weights: make it readable")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*names, *links]):
            file = Path(place) / name
            if not is_made_again(file.relative_to(folder)):
                return file
    return None


def is_made_again(file: Path) -> bool:
    """Whether a file of a run folder, by its path in there, is one that preparing or starting makes again."""
    if any(fnmatchcase(str(file), half) for half in HALVES):
        return True
    patterns = (pattern.split("/") for pattern in MADE_AGAIN)
    return any(len(one) == len(file.parts) and all(map(fnmatchcase, file.parts, one)) for one in patterns)


def verify(run: Run, folder: Path) -> None:
    """Raise `UserError` unless the checkpoint is as it was written, with all that a resume needs."""
    if wrong := checkpoint_damage(folder) or _lacks(run, folder):
        earlier = [c for c in run.checkpoints if checkpoint_step(c) < checkpoint_step(folder)]
        then = f"it then goes on from {earlier[-1].name}" if earlier else "it then starts from the beginning"
        raise UserError(f"{folder.name} is damaged: {wrong}; remove {folder} and start the run again, {then}")


def _lacks(run: Run, folder: Path) -> str:
    """What a resumable checkpoint lacks, or has too much; transformers passes over states that are not there."""
    named = set((manifest_of(folder) or {}).get("files", ()))
    here = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if unnamed := sorted(here - named):
        return f"{MANIFEST} does not name {unnamed[0]}"
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
    for pattern in wanted:
        if not any(re.fullmatch(pattern, name) for name in here):
            return f"a file of its optimizer's, scheduler's or random states is missing ({pattern})"
    if (state := read_json(folder / "trainer_state.json", TrainerState)).global_step != checkpoint_step(folder):
        return f"its trainer_state.json is of step {state.global_step}"
    return ""


@dataclass(frozen=True)
class TrainerState:
    """Of transformers' `trainer_state.json`: the step, and how many there are to be."""

    global_step: int
    max_steps: int


def is_trained(folder: Path) -> bool:
    """Whether the checkpoint is that of the last step, so that only the end of the run is to be written."""
    state = read_json(folder / "trainer_state.json", TrainerState)
    return state is not None and state.global_step >= state.max_steps


def checkpoint_damage(folder: Path, only: Collection[str] | None = None) -> str:
    """How the first file that differs from the manifest differs from it; empty if all, or all of `only`, are whole."""
    try:
        manifest = manifest_of(folder)
    except UserError as error:
        return str(error)
    if manifest is None:
        return ""
    if "files" not in manifest:
        return f"{MANIFEST} does not name its files"
    for name, expected in manifest["files"].items():
        file = folder / name
        if only is not None and name not in only:
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
    """Keep the lines of `metrics.jsonl` up to `step`, so that a resumed run doubles none."""
    kept = []
    for line in (read_text(file) or "").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
            break
    if kept or file.exists():
        with written_whole(file) as stream:
            stream.writelines(kept)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
