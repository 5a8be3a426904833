"""`RunConfig`, and the run folder: the only thing that the notebook and the training process share."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.chat.mistral import VERSIONS
from minisft.errors import UserError
from minisft.files import checked, open_own, parse_json, read_json, read_text, try_lock, user_path
from minisft.labels.encode_dataset import TRAIN_ON
from minisft.labels.encode_row import TRUNCATIONS
from minisft.run.records import About, Done, Failure, Manifest, Metric, RankMemory
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

CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "batching": ("auto", "padding-free", "padded", "packed"),
    "template": VERSIONS,
    "truncation": TRUNCATIONS,
    "train_on": TRAIN_ON,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run, with the reason for each default. Raises `UserError` for what cannot be.

    The learning rate, epochs, batch, weight decay, clipping and length are those of the work that this course follows.

    What is trained
      name                   the run's folder under outputs/model; the strategy's name if not given
      strategy               `vanilla`: the simplest thing that is right
      ranks                  1: processes; as many as GPUs is usual, two on a CPU to see ZeRO at work
      model, data            `smollm2`, `sharegpt`: both can be had without a hub
      template               `v1`: its marks are plain text, so nothing has to be learned from nothing
      max_length             2048 tokens: most answers fit; memory and time grow with it
      truncation             `token` keeps the most; `turn` whole answers only, `drop` no long rows
      train_on               `all` answers of a conversation; its `last`; or `each` in a row of its own
      max_characters         None: no limit; leaves longer conversations out of both sides, after the split
      max_rows               None: all; the first so many train conversations
      test_fraction          0.1: the split is 9 : 1, by whole conversation

    How
      epochs                 8: a small model and a small learning rate want several
      max_steps              None: all of `epochs`
      batch_size             8 rows per rank and micro-batch (packs, where `batching` is `packed`)
      accumulation           1: micro-batches per step; the loss does not depend on it, the memory does
      learning_rate          8e-6: small steps, since the model already speaks
      warmup                 0.1 of the steps: Adam's averages are poor at first; then linearly down to 0
      weight_decay           1e-5: next to none; eight epochs need little
      max_grad_norm          2.0: one strange batch cannot throw the model off
      precision              `auto`: bf16 or fp16 where the device is fast at it, else fp32; masters are always fp32
      batching               `auto`: `padding-free` where the model's attention allows, else `padded`, with rows of
                             like length together; `packed` fills every row of a batch up to `max_length`
      activation_checkpointing  False: True computes activations again in the backward pass, a third more work for a
                             fraction of their memory
      seed                   0: of the split, the order of the rows and the model's dropout

    What is kept
      save_steps             None: a checkpoint per epoch
      keep_checkpoints       None: all; else the last so many, and the best
      eval_rows              64 test rows whose loss is taken at every checkpoint, which tells the best; 0 for none
      memory_timeline        False: True follows every tensor of one early step, for `memory.json`; it slows that step
      resumable              True: a killed run goes on where it was; its checkpoints are three times as large
      trust_remote_code      False: True runs code that comes with a model; only for those you trust. It belongs to this
                             invocation: a run folder that says so only asks for it
    """

    name: str = ""
    strategy: str = "vanilla"
    ranks: int = 1
    model: str = "smollm2"
    data: str = "sharegpt"
    template: str = "v1"
    max_length: int = 2048
    truncation: str = "token"
    train_on: str = "all"
    max_characters: int | None = None
    max_rows: int | None = None
    test_fraction: float = 0.1
    epochs: float = 8
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 8e-6
    warmup: float = 0.1
    weight_decay: float = 1e-5
    max_grad_norm: float = 2.0
    precision: str = "auto"
    batching: str = "auto"
    activation_checkpointing: bool = False
    save_steps: int | None = None
    keep_checkpoints: int | None = None
    eval_rows: int = 64
    memory_timeline: bool = False
    resumable: bool = True
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.strategy)
        for what in ("model", "data"):
            _require_utf8(f"the {what}", getattr(self, what))
        if self.strategy not in STRATEGIES:
            raise UserError(f"unknown strategy {self.strategy!r}: use one of {', '.join(STRATEGIES)}")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"unknown {name.replace('_', ' ')} {value!r}: use one of {', '.join(known)}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(
                f"run name {self.name!r} cannot be a folder: use letters, digits, dots, dashes, underscores"
            )
        for name in (
            "ranks",
            "batch_size",
            "accumulation",
            "max_steps",
            "save_steps",
            "max_rows",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if self.strategy == "vanilla" and self.ranks != 1:
            raise UserError(f"vanilla is one process, but {self.ranks} ranks were asked for: use ddp or a ZeRO stage")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give a whole number from 0 to {2**32 - 1}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"weight decay is {self.weight_decay}: give 0 or a positive number")
        for name, top in (("warmup", 1), ("test_fraction", 1)):
            if not 0 <= getattr(self, name) < top:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give a fraction from 0 to 1")
        if self.eval_rows < 0:
            raise UserError(f"eval rows is {self.eval_rows}: give 0 for none, or a number of test rows")
        if self.max_length < 2:
            raise UserError(f"max length is {self.max_length}: give at least 2 tokens")

    @classmethod
    def course(cls, strategy: str = "vanilla", **changes: Any) -> RunConfig:
        """The small preset: two cores train it in about a minute per strategy.

        Short conversations, few steps, and a larger learning rate, since 8e-6 moves little in so few steps; fp32,
        so that the strategies' losses can be compared digit by digit. The global batch is 8 for every strategy.
        `MINISFT_COURSE_STEPS` shortens it further, for trying whether everything runs.
        """
        wish = os.environ.get("MINISFT_COURSE_STEPS") or "6"
        if not re.fullmatch(r"[0-9]{1,9}", wish) or int(wish) < 1:
            raise UserError(f"MINISFT_COURSE_STEPS is {wish!r}: give a number of steps, at least 1")
        steps = int(wish)
        ranks = changes.pop("ranks", None)
        if ranks is None:
            ranks = 1 if strategy == "vanilla" else 2
        preset = {
            "max_length": 128,
            "max_characters": 300,
            "max_steps": steps,
            "learning_rate": 1e-4,
            "batch_size": max(1, 8 // max(1, ranks)),
            "save_steps": max(2, steps // 2),
            "precision": "fp32",
            "eval_rows": 16,
            "resumable": False,
            "memory_timeline": True,
        }
        return cls(**(preset | changes), strategy=strategy, ranks=ranks)

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path = Path("run.json")) -> RunConfig:
        """The settings that `file` holds. Raises `UserError` for unknown names, wrong types and what cannot be."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise UserError(f"unknown run settings {', '.join(sorted(unknown))}: use {', '.join(sorted(known))}")
        return checked(values, cls, file)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def project_root() -> Path:
    """The nearest folder at or above the current one that holds the launchers; else the current folder."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "launchers" / "run_zero.sh").exists()), here)


def outputs_root() -> Path:
    """Where runs and evaluations go: `MINISFT_OUTPUTS`, else `outputs` in the project."""
    own = os.environ.get("MINISFT_OUTPUTS")
    folder = user_path(own).absolute() if own else project_root() / "outputs"
    _require_utf8("the outputs folder", str(folder))
    return folder


def _require_utf8(what: str, path: str) -> None:
    """The libraries that read and write data take no other names. Raises `UserError`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {one_line(path)} has bytes that are not UTF-8 in its name: rename it") from None


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
        _require_utf8("the run folder", str(folder))
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

    def wrote(self, record: Manifest | Done) -> bool:
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
        if not os.path.lexists(lock_of(self.folder)):
            return False
        with os.fdopen(open_own(lock_of(self.folder), os.O_RDONLY | os.O_NONBLOCK)) as lock:
            return not try_lock(lock, fcntl.LOCK_SH)

    @property
    def failure(self) -> Failure | None:
        """Which `rank` failed, at which `step`, for what `reason`; None if none did."""
        try:
            return read_json(self.folder / "FAILED", Failure)
        except UserError:
            return {"rank": None, "step": None, "reason": "the reason could not be written: is the disk full?"}

    @property
    def status(self) -> str:
        """`done`, `failed`, `unfinished` (started, no marker), or `prepared`."""
        with suppress(UserError):  # one that is damaged is no word of success
            done = read_json(self.folder / "DONE", Done)
            if done is not None and self.wrote(done):
                return "done"
        if (self.folder / "FAILED").exists():
            return "failed"
        return "unfinished" if (self.folder / "logs").exists() else "prepared"

    def _about(self) -> About:
        try:
            about = read_json(self.folder / "run.json", About)
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


def lock_of(folder: Path) -> Path:
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


def require_contained(run: Run) -> None:
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
