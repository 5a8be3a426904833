"""The run folder: the only thing that the notebook and the training process share."""

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

FOLDERS = ("data", "logs", "ranks", "tensorboard", ".saving")  # of a run folder; the others are checkpoints
FILES = (
    *("run.json", "deepspeed.json", "command.txt", "hosts.json", "ledger.json"),
    *("metrics.jsonl", "memory.json", "DONE", "FAILED"),
)
MANIFEST = "manifest.json"  # of a checkpoint: its step, its test loss, its files and their checksums
if TYPE_CHECKING:
    from minisft.launch.hosts import Place


def project_root() -> Path:
    """The nearest folder at or above the current one that holds the launchers; else the current folder."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "launchers" / "run_zero.sh").exists()), here)


def outputs_root() -> Path:
    """Where runs and evaluations go: `MINISFT_OUTPUTS`, else `outputs` in the project."""
    own = os.environ.get("MINISFT_OUTPUTS")
    folder = user_path(own).absolute() if own else project_root() / "outputs"
    require_utf8("the outputs folder", str(folder))
    return folder


@dataclass(frozen=True)
class Run:
    """One run folder. Nothing of it is cached: every property reads what is on disk now.

    `trust_remote_code` is the consent of this invocation to run code that comes with the model; what the folder says of
    it is a request. `prepared` is the folder's `identity` when this invocation prepared or loaded it, "" if it did not.
    `place` are the hosts that this invocation chose.
    """

    folder: Path
    trust_remote_code: bool = False
    prepared: str = field(default="", compare=False)
    place: Place | None = field(default=None, compare=False)

    @classmethod
    def load(cls, name: str | Path, trust_remote_code: bool = False) -> Run:
        """A run by its name under `outputs/model`, or by its folder. Raises `UserError` if there is none."""
        by_name = outputs_root() / "model" / str(name)
        folder = by_name if (by_name / "run.json").exists() else user_path(name)
        if not (folder / "run.json").exists():
            if by_name.with_name(f".{by_name.name}.removed").is_dir():
                raise UserError(f"replacing {name} was interrupted: prepare it once more, which puts it back")
            known = ", ".join(run.name for run in all_runs()) or "none yet"
            raise UserError(f"no run {str(name)!r}: give a run's name or folder (runs in outputs/model: {known})")
        require_utf8("the run folder", str(folder))
        return cls(Path(os.path.normpath(folder.absolute())), trust_remote_code).as_it_is()

    def as_it_is(self) -> Run:
        """The same run, which remembers the preparation that its folder holds now."""
        return replace(self, prepared=self.identity)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> RunConfig:
        """The settings; consent to remote code is that of this invocation, whatever the folder says."""
        return replace(self.written_config, trust_remote_code=self.trust_remote_code)

    @property
    def written_config(self) -> RunConfig:
        """The settings as the folder has them."""
        return RunConfig.from_dict(self._about().config, self.folder / "run.json")

    @property
    def identity(self) -> str:
        """12 characters that change with the settings, the model and the rows that the folder was prepared for."""
        parts = [read_text(self.folder / name) or "" for name in ("run.json", "data/made_of.json")]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def wrote(self, record: Manifest | DoneRecord) -> bool:
        """Whether a manifest or `DONE` is this run's; one of an earlier version, which names no run, passes."""
        return record.get("run") in (None, self.identity)

    @property
    def model_files(self) -> dict[str, str]:
        """The checksums of the model that training starts from, by file name, as it was when the run was prepared."""
        return self._about().model_files

    @property
    def versions(self) -> dict[str, str]:
        return self._about().versions

    @property
    def model_folder(self) -> Path:
        return Path(self._about().model_folder)

    @property
    def precision(self) -> str:
        """What `auto` became on this machine."""
        return self._about().precision

    @property
    def on_gpu(self) -> bool:
        return self._about().on_gpu

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
        """Measured bytes, one entry per rank; empty until the run has measured."""
        return read_json(self.folder / "memory.json", list[RankMemory]) or []

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry per logged step; a line that is still being written is left out."""
        file = self.folder / "metrics.jsonl"
        lines = (read_text(file) or "").split("\n")[:-1]
        try:
            return parse_json(f"[{','.join(lines)}]", file, list[Metric])
        except UserError as error:
            raise UserError(f"{file} has a line that is not JSON of a step ({error}): start the run again") from error

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, in step order."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9][0-9]{0,11}", p.name)]
        return sorted(found, key=checkpoint_step)

    @property
    def test_losses(self) -> dict[int, float]:
        """The test loss of each checkpoint that has a finite one, by step."""
        found: dict[int, float] = {}
        for checkpoint in self.checkpoints:
            with suppress(UserError):  # whoever relies on a manifest reads it with `manifest_of`
                loss = (manifest_of(checkpoint) or {}).get("test_loss")
                if loss is not None and math.isfinite(loss):
                    found[checkpoint_step(checkpoint)] = loss
        return found

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest finite test loss, or None where none has one."""
        losses = self.test_losses
        return self.folder / f"checkpoint-{min(losses, key=losses.__getitem__)}" if losses else None

    @property
    def live(self) -> bool:
        """Whether a process of this machine is preparing or training it right now."""
        if not os.path.lexists(lock_file(self.folder)):
            return False
        with os.fdopen(open_own(lock_file(self.folder), os.O_RDONLY | os.O_NONBLOCK)) as lock:
            return not try_lock(lock, fcntl.LOCK_SH)

    @property
    def failure(self) -> FailureRecord | None:
        """Which `rank` failed, at which `step`, for what `reason`; None if none did."""
        try:
            return read_json(self.folder / "FAILED", FailureRecord)
        except UserError:
            return {"rank": None, "step": None, "reason": "the reason could not be written: is the disk full?"}

    @property
    def status(self) -> str:
        """`done`, `failed`, `unfinished` (started, no marker), or `prepared`."""
        with suppress(UserError):  # one that is damaged is no word of success
            done = read_json(self.folder / "DONE", DoneRecord)
            if done is not None and self.wrote(done):
                return "done"
        if (self.folder / "FAILED").exists():
            return "failed"
        return "unfinished" if (self.folder / "logs").exists() else "prepared"

    def _about(self) -> RunRecord:
        try:
            about = read_json(self.folder / "run.json", RunRecord)
        except UserError as error:
            raise UserError(f"{error}; make the run again with --overwrite") from error
        if about is None:
            raise UserError(f"{self.folder} has no run.json: it holds no run")
        return about


def all_runs(trust_remote_code: bool = False) -> list[Run]:
    """Every run under `outputs/model`, in the strategies' order and then by name."""
    runs = [Run(p.parent.absolute(), trust_remote_code) for p in (outputs_root() / "model").glob("[!.]*/run.json")]
    order = {strategy: i for i, strategy in enumerate(STRATEGIES)}
    return sorted(runs, key=lambda run: (order.get(run.name, len(order)), run.name))


def lock_file(folder: Path) -> Path:
    """The file that whoever prepares or trains a run holds locked; beside its folder, which may be replaced.

    Of a folder that is a link, beside what it points to: whatever it is called, it has one lock.
    """
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def require_own_files(run: Run) -> None:
    """Refuse a run folder with anything but files and folders inside, each where it belongs. Raises `UserError`.

    Training would write, and remove, where a link leads, and wait for ever at a pipe.
    """
    top = run.folder.resolve()
    for place, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(place) / name
            if path.is_symlink():
                raise UserError(f"{path} is a link, and a run folder holds its own files: put the file itself there")
            if name in files and not path.is_file() and path.exists():
                raise UserError(f"{path} is neither a file nor a folder: remove it")
            if path.parent == top and (name in FOLDERS or name in FILES) and (name in FOLDERS) != (name in folders):
                wanted = "folder" if name in FOLDERS else "file"
                raise UserError(f"{path} is not a {wanted}, and a {wanted} belongs there: move it away")


def require_harmless_deepspeed(run: Run) -> None:
    """Refuse a `deepspeed.json` that could write files elsewhere or load code. Raises `UserError`."""
    if names := reaching_out(run.deepspeed or {}):
        raise UserError(
            f"{run.folder / 'deepspeed.json'} sets {one_line(', '.join(names), 100)}: in a run folder only sizes, "
            "precision and the split of the states may be set, so take it out"
        )


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def manifest_of(checkpoint: Path) -> Manifest | None:
    """What a checkpoint says of itself, or None if it has no manifest. Raises `UserError` if that is damaged."""
    return read_json(checkpoint / MANIFEST, Manifest)
