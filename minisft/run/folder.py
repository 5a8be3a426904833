"""The run folder: the only channel between the notebook and the training processes."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.files import open_own, parse_json, read_json, read_text, user_path
from minisft.locks import try_lock
from minisft.run.config import RunConfig, require_utf8
from minisft.run.records import DoneRecord, FailureRecord, Manifest, Metric, RankMemory, RunRecord
from minisft.text import one_line
from minisft.zero.strategies import STRATEGIES, reaching_out

FOLDERS = ("data", "logs", "ranks", "tensorboard", ".saving")  # in a run folder, besides the checkpoints
FILES = (
    "run.json",
    "deepspeed.json",
    "command.txt",
    "hosts.json",
    "ledger.json",
    "metrics.jsonl",
    "memory.json",
    "DONE",
    "FAILED",
)
MANIFEST = "manifest.json"  # in a checkpoint: its step, its test loss, and its files with their checksums

if TYPE_CHECKING:
    from minisft.launch.hosts import Place


def project_root() -> Path:
    """The nearest folder at or above the current one with the launchers; else the current one."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "launchers" / "run_zero.sh").exists()), here)


def outputs_root() -> Path:
    """The folder for runs and evaluations: `MINISFT_OUTPUTS`, else `outputs` in the project.

    Raises `UserError` if its path is not UTF-8.
    """
    chosen = os.environ.get("MINISFT_OUTPUTS")
    folder = user_path(chosen).absolute() if chosen else project_root() / "outputs"
    require_utf8("the outputs folder", str(folder))
    return folder


@dataclass(frozen=True)
class Run:
    """One run folder. Nothing is cached: every property reads the files as they are now.

    `trust_remote_code` is this invocation's consent to run code that comes with the model; the
    setting in the folder is only a request. `prepared` is the folder's `identity` when this
    invocation prepared or loaded it, or "". `place` holds the hosts that this invocation chose.
    """

    folder: Path
    trust_remote_code: bool = False
    prepared: str = field(default="", compare=False)
    place: Place | None = field(default=None, compare=False)

    @classmethod
    def load(cls, name: str | Path, trust_remote_code: bool = False) -> Run:
        """Load a run by its name under `outputs/model` or by its folder.

        Raises `UserError` if there is none.
        """
        by_name = outputs_root() / "model" / str(name)
        folder = by_name if (by_name / "run.json").exists() else user_path(name)
        if not (folder / "run.json").exists():
            if (by_name.parent / f".{by_name.name}.removed").is_dir():
                raise UserError(f"replacing {name} was interrupted: prepare it again, which restores it")
            known = ", ".join(run.name for run in all_runs()) or "none yet"
            raise UserError(f"no run {str(name)!r}: give a run's name or folder (runs in outputs/model: {known})")
        require_utf8("the run folder", str(folder))
        return cls(Path(os.path.normpath(folder.absolute())), trust_remote_code).as_it_is()

    def as_it_is(self) -> Run:
        """The same run, with `prepared` set to the present `identity` of its folder."""
        return replace(self, prepared=self.identity)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> RunConfig:
        """The settings, with this invocation's consent to remote code instead of the folder's."""
        return replace(self.written_config, trust_remote_code=self.trust_remote_code)

    @property
    def written_config(self) -> RunConfig:
        """The settings exactly as written in the folder."""
        return RunConfig.from_dict(self._record().config, self.folder / "run.json")

    @property
    def identity(self) -> str:
        """12 characters that identify the prepared settings, model and rows."""
        parts = [read_text(self.folder / name) or "" for name in ("run.json", "data/made_of.json")]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def wrote(self, record: Manifest | DoneRecord) -> bool:
        """Whether a manifest or `DONE` belongs to this run.

        Earlier versions name no run, and count as its own.
        """
        return record.get("run") in (None, self.identity)

    @property
    def model_files(self) -> dict[str, str]:
        """Checksums of the initial model's files, by file name, taken when the run was prepared."""
        return self._record().model_files

    @property
    def versions(self) -> dict[str, str]:
        return self._record().versions

    @property
    def model_folder(self) -> Path:
        return Path(self._record().model_folder)

    @property
    def precision(self) -> str:
        """The precision in use: `auto` is resolved when the run is prepared."""
        return self._record().precision

    @property
    def on_gpu(self) -> bool:
        return self._record().on_gpu

    @property
    def command(self) -> str:
        return (read_text(self.folder / "command.txt", errors="surrogateescape") or "").strip()

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        return read_json(self.folder / "deepspeed.json", dict[str, Any])

    @property
    def ledger(self) -> dict[str, Any]:
        return read_json(self.folder / "ledger.json", dict[str, Any])

    @property
    def memory(self) -> list[dict[str, Any]]:
        """Measured bytes, one entry per rank; empty until the run has measured them."""
        return read_json(self.folder / "memory.json", list[RankMemory]) or []

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry per logged step, without a last line that is still being written."""
        file = self.folder / "metrics.jsonl"
        lines = (read_text(file) or "").split("\n")[:-1]
        try:
            return parse_json(f"[{','.join(lines)}]", file, list[Metric])
        except UserError as error:
            raise UserError(f"{file} has a line that is not JSON of a step ({error}): start the run again") from error

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, in step order."""
        name = re.compile(r"checkpoint-[1-9][0-9]{0,11}")
        return sorted((p for p in self.folder.glob("checkpoint-*") if name.fullmatch(p.name)), key=checkpoint_step)

    @property
    def test_losses(self) -> dict[int, float]:
        """The finite test losses of the checkpoints that this run wrote, by step."""
        losses: dict[int, float] = {}
        for checkpoint in self.checkpoints:
            with suppress(UserError):  # code that depends on a manifest reads it with `manifest_of`
                manifest = manifest_of(checkpoint) or {}
                loss = manifest.get("test_loss")
                if loss is not None and math.isfinite(loss) and self.wrote(manifest):
                    losses[checkpoint_step(checkpoint)] = loss
        return losses

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest finite test loss, or None if no checkpoint has one."""
        losses = self.test_losses
        return self.folder / f"checkpoint-{min(losses, key=losses.__getitem__)}" if losses else None

    @property
    def live(self) -> bool:
        """Whether a process on this machine is preparing or training the run now."""
        if not os.path.lexists(lock_file(self.folder)):
            return False
        with os.fdopen(open_own(lock_file(self.folder), os.O_RDONLY | os.O_NONBLOCK)) as lock:
            return not try_lock(lock, fcntl.LOCK_SH)

    @property
    def failure(self) -> FailureRecord | None:
        """The `rank` that failed, its `step` and the `reason`; None if the run has not failed."""
        try:
            return read_json(self.folder / "FAILED", FailureRecord)
        except UserError:
            return {"rank": None, "step": None, "reason": "the reason could not be written: is the disk full?"}

    @property
    def status(self) -> str:
        """`done`, `failed`, `unfinished` (started, but neither done nor failed), or `prepared`."""
        with suppress(UserError):  # a damaged DONE does not count as success
            done = read_json(self.folder / "DONE", DoneRecord)
            if done is not None and self.wrote(done):
                return "done"
        if (self.folder / "FAILED").exists():
            return "failed"
        return "unfinished" if (self.folder / "logs").exists() else "prepared"

    def _record(self) -> RunRecord:
        try:
            record = read_json(self.folder / "run.json", RunRecord)
        except UserError as error:
            raise UserError(f"{error}; prepare the run again with --overwrite") from error
        if record is None:
            raise UserError(f"{self.folder} has no run.json, so it is not a run folder: prepare the run again")
        return record


def all_runs(trust_remote_code: bool = False) -> list[Run]:
    """Every run under `outputs/model`: those named after strategies first, the others by name."""
    runs = [Run(p.parent.absolute(), trust_remote_code) for p in (outputs_root() / "model").glob("[!.]*/run.json")]
    order = {strategy: i for i, strategy in enumerate(STRATEGIES)}
    return sorted(runs, key=lambda run: (order.get(run.name, len(order)), run.name))


def lock_file(folder: Path) -> Path:
    """The lock file that a process holds while it prepares or trains a run.

    It is beside the folder, because the folder may be replaced. For a link it is beside the target,
    so that all paths to one folder share one lock.
    """
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def require_own_files(run: Run) -> None:
    """Raise `UserError` for links, pipes and devices in a run folder, and for misplaced files.

    Training would write to and remove the target of a link, and block forever on a pipe.
    """
    top = run.folder.resolve()
    for parent, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, which a run folder must not contain: replace it with the file itself"
                )
            if name in files and not path.is_file() and path.exists():
                raise UserError(f"{path} is neither a file nor a folder: remove it")
            if path.parent == top and (name in FOLDERS or name in FILES) and (name in FOLDERS) != (name in folders):
                wanted = "folder" if name in FOLDERS else "file"
                raise UserError(f"{path} is not a {wanted}, and a {wanted} belongs there: move it away")


def require_harmless_deepspeed(run: Run) -> None:
    """Raise `UserError` for a `deepspeed.json` that could write files elsewhere or load code."""
    if names := reaching_out(run.deepspeed or {}):
        raise UserError(
            f"{run.folder / 'deepspeed.json'} sets {one_line(', '.join(names), 100)}: in a run folder only sizes, "
            "precision and the split of the states may be set, so take it out"
        )


def checkpoint_step(folder: Path) -> int:
    """The optimizer step after which a checkpoint was saved, from the name of its folder."""
    return int(folder.name.rpartition("-")[2])


def manifest_of(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None if it has none.

    Raises `UserError` if the manifest is damaged.
    """
    return read_json(checkpoint / MANIFEST, Manifest)
