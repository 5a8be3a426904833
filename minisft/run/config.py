"""`RunConfig`: every setting of a run, defined once.

A field carries its type, default, help, reason and limits. The command line, the YAML and JSON files, `--help`, and
what decides whether prepared rows can be used again are all made from the fields. To add a setting, add a field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from typing_extensions import TypedDict

from minisft.chat.registry import DEFAULT, TEMPLATES
from minisft.errors import UserError
from minisft.files import checked, read_text, user_path
from minisft.labels.encode_dataset import TRAIN_ON
from minisft.labels.encode_row import TRUNCATIONS
from minisft.text import note, one_line
from minisft.zero.strategies import strategy_named

PRESETS = Path(__file__).with_name("presets")
MOST_BYTES = 1_000_000  # of a file of settings
GLOBAL_BATCH = "global_batch"  # in a file only: rows per optimizer step, from which batch_size follows


@dataclass(frozen=True)
class Limit:
    """What a value must satisfy, and how an error describes it."""

    allows: Callable[[Any], bool]
    wanted: str


AT_LEAST_1 = Limit(lambda value: value >= 1, "at least 1")
AT_LEAST_2_TOKENS = Limit(lambda value: value >= 2, "at least 2 tokens")
POSITIVE = Limit(lambda value: math.isfinite(value) and value > 0, "a positive number")
NOT_NEGATIVE = Limit(lambda value: math.isfinite(value) and value >= 0, "0 or a positive number")
FRACTION = Limit(lambda value: 0 <= value < 1, "a fraction from 0 to 1")
COUNT_OR_NONE = Limit(lambda value: value >= 0, "0 for none, or a number of test rows")
SEED = Limit(lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Setting:
    """What the field of a `RunConfig` carries besides its type and default.

    `shapes_rows` marks the settings that decide what the prepared rows are; `flags` replaces the option's usual name.
    """

    help: str
    reason: str = ""
    choices: Collection[str] = ()
    limit: Limit | None = None
    shapes_rows: bool = False
    flags: tuple[str, ...] = ()


def setting(default: Any, help: str, reason: str = "", **rest: Any) -> Any:
    """A dataclass field with a `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, reason, **rest)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. Raises `UserError` for a value that cannot be used.

    The defaults of learning rate, epochs, batch, weight decay, clipping and length are those of the work that this
    course follows (`presets/full.yaml`).
    """

    # What is trained
    name: str = setting("", "name of the run folder under outputs/model; the strategy's name if not given")
    strategy: str = setting(
        "vanilla",
        "vanilla, ddp, zero0 to zero3, zero2-offload or zero3-offload",
        "the simplest one that is right",
        flags=("--strategy", "-s"),
    )
    ranks: int = setting(1, "processes, one per GPU", "two on a CPU show ZeRO at work", limit=AT_LEAST_1)
    model: str = setting(
        "smollm2", "smollm2, a model folder, or a hub id", "it can be had without a hub", flags=("--model", "-m")
    )
    data: str = setting(
        "sharegpt", "sharegpt, a file or folder, or a hub id", "it can be had without a hub", flags=("--data", "-d")
    )
    template: str = setting(
        DEFAULT,
        f"chat template: {', '.join(TEMPLATES)}",
        "its markers are plain text, so every token already has a trained embedding",
        choices=TEMPLATES,
        shapes_rows=True,
    )
    max_length: int = setting(
        2048,
        "longest row, in tokens",
        "most answers fit; memory and time grow with it",
        limit=AT_LEAST_2_TOKENS,
        shapes_rows=True,
    )
    truncation: str = setting(
        "token",
        "what a row that is too long loses: token, turn or drop",
        "token keeps the most; turn keeps whole answers only, drop leaves long rows out",
        choices=TRUNCATIONS,
        shapes_rows=True,
    )
    train_on: str = setting(
        "all",
        "answers that are trained: all, the last, or each in a row of its own",
        choices=TRAIN_ON,
        shapes_rows=True,
    )
    max_characters: int | None = setting(
        None,
        "leave out longer conversations, on both sides of the split; no limit if not given",
        limit=AT_LEAST_1,
        shapes_rows=True,
    )
    max_rows: int | None = setting(
        None,
        "train on the first so many conversations only; all if not given",
        limit=AT_LEAST_1,
        shapes_rows=True,
    )
    test_fraction: float = setting(
        0.1, "share of the conversations that is kept for testing", "9 : 1", limit=FRACTION, shapes_rows=True
    )

    # How it is trained
    epochs: float = setting(
        8, "passes over the training rows", "a small model and a small learning rate need several", limit=POSITIVE
    )
    max_steps: int | None = setting(
        None, "stop after so many optimizer steps; after all epochs if not given", limit=AT_LEAST_1
    )
    batch_size: int = setting(
        8, "rows per rank and micro-batch; packs of rows where batching is packed", limit=AT_LEAST_1
    )
    accumulation: int = setting(
        1, "micro-batches per optimizer step", "the loss does not depend on it, the memory does", limit=AT_LEAST_1
    )
    learning_rate: float = setting(
        8e-6,
        "peak learning rate",
        "small steps: the model already writes fluently",
        limit=POSITIVE,
        flags=("--learning-rate", "--lr"),
    )
    warmup: float = setting(
        0.1,
        "share of the steps that warm up, before the rate falls linearly to 0",
        "Adam's averages are poor at first",
        limit=FRACTION,
    )
    weight_decay: float = setting(1e-5, "AdamW's weight decay", "eight epochs need little", limit=NOT_NEGATIVE)
    max_grad_norm: float = setting(
        2.0, "gradient clipping", "one unusual batch cannot derail the model", limit=POSITIVE
    )
    precision: str = setting(
        "auto",
        "auto, fp32, bf16 or fp16",
        "auto takes bf16 or fp16 where the device is fast at it; master weights are always fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    batching: str = setting(
        "auto",
        "auto, padding-free, padded or packed",
        "padding-free where the model's attention allows it, else padded with rows of similar length together; packed "
        "fills every row up to the maximum length",
        choices=("auto", "padding-free", "padded", "packed"),
    )
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass", "a third more work for a fraction of their memory"
    )
    seed: int = setting(0, "seed of the split, of the order of rows and of dropout", limit=SEED, shapes_rows=True)

    # What is kept
    save_steps: int | None = setting(None, "steps between checkpoints; one per epoch if not given", limit=AT_LEAST_1)
    keep_checkpoints: int | None = setting(
        None, "keep the last so many checkpoints and the best; all if not given", limit=AT_LEAST_1
    )
    eval_rows: int = setting(
        64,
        "test rows whose loss is computed at each checkpoint; 0 for none",
        "the lowest loss marks the best checkpoint",
        limit=COUNT_OR_NONE,
        shapes_rows=True,
    )
    memory_timeline: bool = setting(
        False, "record every tensor of one early step in memory.json", "it slows that step down"
    )
    resumable: bool = setting(
        True,
        "save optimizer states with each checkpoint, so that a killed run resumes",
        "checkpoints are three times as large",
        flags=("--resumable/--weights-only",),
    )
    trust_remote_code: bool = setting(
        False,
        "run code that comes with the model: only for models you trust",
        "a file or a run folder can only ask for it; the consent is this invocation's",
        flags=("--trust-remote-code",),
    )

    def __post_init__(self) -> None:
        strategy = strategy_named(self.strategy)
        if not self.name:
            object.__setattr__(self, "name", self.strategy)
        for what in ("model", "data"):
            require_utf8(f"the {what}", getattr(self, what))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(
                f"run name {self.name!r} cannot be a folder: use letters, digits, dots, dashes, underscores"
            )
        for name, about in SETTINGS.items():
            value, words = getattr(self, name), name.replace("_", " ")
            if about.choices and value not in about.choices:
                raise UserError(f"unknown {words} {value!r}: use one of {', '.join(about.choices)}")
            if about.limit and value is not None and not about.limit.allows(value):
                raise UserError(f"{words} is {value}: give {about.limit.wanted}")
        if strategy.is_one_process and self.ranks != 1:
            raise UserError(
                f"{self.strategy} is one process, but {self.ranks} ranks were asked for: use ddp or a ZeRO stage"
            )

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @classmethod
    def course(cls, strategy: str = "vanilla", **changes: Any) -> RunConfig:
        """The small preset, `presets/course.yaml`. `MINISFT_COURSE_STEPS` shortens it further."""
        return cls.from_preset("course", strategy=strategy, **changes)

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> RunConfig:
        """The settings of a preset, with `changes`. Raises `UserError` if there is no such preset."""
        if preset not in preset_names():
            raise UserError(f"unknown preset {preset!r}: use {' or '.join(preset_names())}")
        values = dict(preset_values(preset))
        if preset == "course" and (steps := os.environ.get("MINISFT_COURSE_STEPS")):
            if not re.fullmatch(r"[0-9]{1,9}", steps) or int(steps) < 1:
                raise UserError(f"MINISFT_COURSE_STEPS is {steps!r}: give a number of steps, at least 1")
            values = values | {"max_steps": int(steps), "save_steps": max(2, int(steps) // 2)}
        return cls._from_values(values, changes, PRESETS / f"{preset}.yaml")

    @classmethod
    def from_file(cls, file: Path | str, **changes: Any) -> RunConfig:
        """The settings of a YAML file, or of a run's `run.json`, with `changes`. Raises `UserError`."""
        values = read_settings(user_path(file))
        if values.pop("trust_remote_code", False) and not changes.get("trust_remote_code"):
            note(
                f"{one_line(file)} asks to run code that comes with the model: give --trust-remote-code if you trust it"
            )
        return cls._from_values(values, changes, Path(file))

    @classmethod
    def _from_values(cls, values: dict[str, Any], changes: dict[str, Any], file: Path) -> RunConfig:
        """`changes` take precedence over the `values` of a file, which are checked first."""
        require_known(values.keys() - {GLOBAL_BATCH})
        rows = values.pop(GLOBAL_BATCH, None)
        both = checked(values, values_shape(), file) | changes
        is_one_process = strategy_named(both.get("strategy", "vanilla")).is_one_process
        if "ranks" not in changes and is_one_process:
            both["ranks"] = 1
        elif both.get("ranks") is None:
            both["ranks"] = usual_ranks()
        config = cls(**both)
        if rows is None or "batch_size" in changes:
            return config
        if not isinstance(rows, int) or rows < 1:
            raise UserError(f"{file}: {GLOBAL_BATCH} is {rows!r}: give a number of rows, at least 1")
        return dataclasses.replace(config, batch_size=max(1, rows // (config.accumulation * config.ranks)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path = Path("run.json")) -> RunConfig:
        """The settings that `file` holds. Raises `UserError` for unknown names, wrong types and unusable values."""
        require_known(values)
        return checked(values, cls, file)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def values_that_shape_rows(self) -> dict[str, Any]:
        """The settings that decide what the prepared rows are."""
        return {name: getattr(self, name) for name, about in SETTINGS.items() if about.shapes_rows}


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in dataclasses.fields(RunConfig)}


def require_known(names: Iterable[str]) -> None:
    """Refuse names that are not settings. Raises `UserError`."""
    if unknown := set(names) - set(SETTINGS):
        raise UserError(
            f"unknown run settings {one_line(', '.join(sorted(unknown)), 200)}: use {', '.join(sorted(SETTINGS))}"
        )


@functools.cache
def values_shape() -> Any:
    """The type of a mapping from some settings to their values, as a file holds it."""
    return TypedDict("values_shape", get_type_hints(RunConfig), total=False)


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


@functools.cache
def preset_values(preset: str) -> dict[str, Any]:
    return read_settings(PRESETS / f"{preset}.yaml")


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, or in the `run.json` of a run. Raises `UserError`."""
    import yaml

    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"there is no file {one_line(file)}: give a YAML file of settings, or a run's run.json")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{one_line(file)} is not valid YAML ({one_line(error, 200)}): correct it") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):  # a run.json
        values = values["config"]
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{one_line(file)} does not hold settings: write a line 'name: value' for each")
    for name, value in values.items():
        if not isinstance(value, str | int | float | None):
            raise UserError(f"{one_line(file)}: {one_line(name, 80)} is not a single value: write 'name: value'")
    return {name: _as_number(name, value) for name, value in values.items()}


def _as_number(name: str, value: Any) -> Any:
    """YAML reads 8e-6, which has no decimal point, as text; a setting that is a number takes it as one."""
    default = next((f.default for f in dataclasses.fields(RunConfig) if f.name == name), None)
    if isinstance(value, str) and isinstance(default, float):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def usual_ranks() -> int:
    """One rank per GPU; two on a CPU, which show ZeRO at work."""
    import torch

    return torch.cuda.device_count() or 2


def require_utf8(what: str, path: str) -> None:
    """Refuse a name that the libraries which read and write data cannot take. Raises `UserError`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {one_line(path)} has bytes that are not UTF-8 in its name: rename it") from None
