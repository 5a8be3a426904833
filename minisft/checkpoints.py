"""Checkpoints that are whole or not there, checked before they are trusted, and few enough to fit the disk.

A checkpoint is written into `.saving/` and gets its name, by one rename, when all of it is on the disk; its
`manifest.json` names every file with size and checksum. So whatever kills a run, `checkpoint-N` is never half a one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import digest, is_inside, read_text, write_json, written_whole
from minisft.runs import MANIFEST, Run, checkpoint_step, manifest_of

SCRATCH = ".saving"
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"})
UNSAFE = ("training_args.bin",)  # a pickle that nobody needs: run.json says the same


def scratch_folder(run: Run) -> Path:
    """Where a checkpoint is while it is being written."""
    return run.folder / SCRATCH


def discard_unfinished(run: Run) -> None:
    """Remove what an interrupted save or removal left; it also frees the space that a full disk lacks."""
    shutil.rmtree(scratch_folder(run), ignore_errors=True)
    for folder in run.folder.glob(".removed-*"):
        shutil.rmtree(folder, ignore_errors=True)


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
    remove(place)  # an earlier one of this step, from before a resume
    folder.rename(place)
    folder.parent.rmdir()
    _sync(run.folder)
    return place


def rotate(run: Run, keep: int | None) -> None:
    """Remove all checkpoints but the last `keep`, the best (lowest test loss), and those with a damaged manifest."""
    if keep is None:
        return
    kept = {*run.checkpoints[-keep:], run.best_checkpoint}
    for folder in set(run.checkpoints) - kept:
        with suppress(UserError):  # a damaged one may be the best
            manifest_of(folder)
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that nobody sees half of it."""
    if folder.exists():
        doomed = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def latest_resumable(run: Run) -> Path | None:
    """The last checkpoint that has optimizer states, or None. Raises `UserError` if any checkpoint is damaged."""
    found = None
    for checkpoint in run.checkpoints:
        try:
            if (manifest_of(checkpoint) or {}).get("resumable"):
                found = checkpoint
        except UserError as error:
            raise UserError(
                f"{error}; move {checkpoint} away and rerun the same command to resume from what is left, or replace "
                "the run with --overwrite"
            ) from error
    return found


def resume_point(run: Run) -> Path | None:
    """The checkpoint to resume from; None if the folder holds no weights, so that the run can start from the beginning.

    Raises `UserError` where there are weights and no checkpoint to resume from: only `--overwrite` removes weights.
    """
    if (checkpoint := latest_resumable(run)) is not None:
        return checkpoint
    if (weights := holds_weights(run.folder)) is not None:
        raise UserError(
            f"{run.folder} holds weights of an unfinished run ({weights.relative_to(run.folder)}) and no checkpoint to "
            "resume from: start it from the beginning with --restart (or --overwrite), give this run another --name, "
            "or start from its weights with --model"
        )
    return None


def holds_weights(folder: Path) -> Path | None:
    """The first file in `folder` that may hold weights, by its ending or because it lies in a checkpoint."""
    for file in sorted(folder.rglob("*")):
        top = file.relative_to(folder).parts[0]
        if top == SCRATCH or top.startswith(".removed-") or file.is_dir():
            continue
        if file.suffix in WEIGHTS or top.startswith(("checkpoint-", "global_step")):
            return file
    return None


def verify(run: Run, folder: Path) -> None:
    """Raise `UserError` unless every file of the checkpoint is as it was written."""
    if wrong := damage(folder):
        earlier = [c for c in run.checkpoints if checkpoint_step(c) < checkpoint_step(folder)]
        then = f"it then goes on from {earlier[-1].name}" if earlier else "it then starts from the beginning"
        raise UserError(f"{folder.name} is damaged: {wrong}; remove {folder} and start the run again, {then}")


def damage(folder: Path, only: Collection[str] | None = None) -> str:
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
