"""`RunConfig`: every setting of a run, defined once.

A field carries its type, default, help, reason and limits. The command line, `--help`, the shape of
YAML and JSON files, and the check whether prepared rows can be reused are all derived from the
fields. To add a setting, add a field.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from typing_extensions import TypedDict

from minisft.chat.registry import DEFAULT, TEMPLATES
from minisft.errors import UserError
from minisft.files import checked, user_path
from minisft.labels.encode_dataset import TRAIN_ON
from minisft.labels.encode_row import TRUNCATIONS
from minisft.run.settings import (
    AT_LEAST_1,
    AT_LEAST_2_TOKENS,
    COUNT_OR_NONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Setting,
    setting,
)
from minisft.run.settings_file import PRESETS, preset_names, read_values
from minisft.text import note, one_line
from minisft.zero.strategies import STRATEGIES, strategy_named

GLOBAL_BATCH = "global_batch"  # key of a settings file: rows per optimizer step; sets batch_size


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of a run. Raises `UserError` for an unusable value.

    The defaults of learning rate, epochs, batch size, weight decay, clipping and length are those
    of the work that this course follows (`presets/full.yaml`).
    """

    # The model and the data
    name: str = setting("", "name of the run folder under outputs/model; the strategy's name if not given")
    strategy: str = setting(
        "vanilla",
        f"how the work is split: {', '.join(STRATEGIES)}",
        "vanilla is the simplest correct choice",
        flags=("--strategy", "-s"),
    )
    ranks: int = setting(
        1,
        "number of processes, one per GPU",
        "two on a CPU suffice to see ZeRO at work",
        limit=AT_LEAST_1,
    )
    model: str = setting(
        "smollm2", "smollm2, a model folder, or a hub id", "smollm2 needs no access to the hub", flags=("--model", "-m")
    )
    data: str = setting(
        "sharegpt",
        "sharegpt, a file or folder, or a hub id",
        "sharegpt needs no access to the hub",
        flags=("--data", "-d"),
    )
    template: str = setting(
        DEFAULT,
        f"chat template: {', '.join(TEMPLATES)}",
        "the markers of v1 are plain text, so every token already has a trained embedding",
        choices=TEMPLATES,
        shapes_rows=True,
    )
    max_length: int = setting(
        2048,
        "maximum row length, in tokens",
        "most answers fit; memory and time grow with it",
        limit=AT_LEAST_2_TOKENS,
        shapes_rows=True,
    )
    truncation: str = setting(
        "token",
        "how to shorten a row that is too long: token, turn or drop",
        "token keeps the most text, turn keeps whole answers only, drop omits the row",
        choices=TRUNCATIONS,
        shapes_rows=True,
    )
    train_on: str = setting(
        "all",
        "answers to train on: all, last, or each in a separate row",
        choices=TRAIN_ON,
        shapes_rows=True,
    )
    max_characters: int | None = setting(
        None,
        "omit conversations with more characters, from training and test rows; no limit if not given",
        limit=AT_LEAST_1,
        shapes_rows=True,
    )
    max_rows: int | None = setting(
        None,
        "train on only the first conversations, at most this many; all if not given",
        limit=AT_LEAST_1,
        shapes_rows=True,
    )
    test_fraction: float = setting(
        0.1, "fraction of the conversations held out for testing", "a 9 : 1 split", limit=FRACTION, shapes_rows=True
    )

    # The training
    epochs: float = setting(
        8, "passes over the training rows", "a small model with a small learning rate needs several", limit=POSITIVE
    )
    max_steps: int | None = setting(
        None, "stop after this many optimizer steps; after all epochs if not given", limit=AT_LEAST_1
    )
    batch_size: int = setting(8, "rows per rank and micro-batch; with packed batching, packs of rows", limit=AT_LEAST_1)
    accumulation: int = setting(
        1,
        "micro-batches per optimizer step",
        "the loss does not depend on it, but memory does",
        limit=AT_LEAST_1,
    )
    learning_rate: float = setting(
        8e-6,
        "peak learning rate",
        "small, because the model already writes fluently",
        limit=POSITIVE,
        flags=("--learning-rate", "--lr"),
    )
    warmup: float = setting(
        0.1,
        "fraction of the steps used for warmup; then the rate falls linearly to 0",
        "Adam's moment estimates are unreliable at first",
        limit=FRACTION,
    )
    weight_decay: float = setting(1e-5, "weight decay of AdamW", "eight epochs need little", limit=NOT_NEGATIVE)
    max_grad_norm: float = setting(
        2.0,
        "maximum gradient norm, by clipping",
        "one unusual batch cannot derail the model",
        limit=POSITIVE,
    )
    precision: str = setting(
        "auto",
        "auto, fp32, bf16 or fp16",
        "auto uses bf16 or fp16 if the device has fast arithmetic for it; master weights are always fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    batching: str = setting(
        "auto",
        "auto, padding-free, padded or packed",
        "auto is padding-free if the model's attention supports it, else padded, which groups rows of similar length; "
        "packed fills every row up to the maximum length",
        choices=("auto", "padding-free", "padded", "packed"),
    )
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass", "a third more computation for a fraction of their memory"
    )
    seed: int = setting(0, "seed of the split, the row order and dropout", limit=SEED, shapes_rows=True)

    # The output
    save_steps: int | None = setting(None, "steps between checkpoints; one per epoch if not given", limit=AT_LEAST_1)
    keep_checkpoints: int | None = setting(
        None, "keep only this many recent checkpoints, and the best one; all if not given", limit=AT_LEAST_1
    )
    eval_rows: int = setting(
        64,
        "number of test rows for the test loss at each checkpoint; 0 for no test loss",
        "the best checkpoint is the one with the lowest test loss",
        limit=COUNT_OR_NONE,
        shapes_rows=True,
    )
    memory_timeline: bool = setting(
        False, "record every tensor of one early step in memory.json", "it slows down that step"
    )
    resumable: bool = setting(
        True,
        "save the optimizer states with each checkpoint, so that a killed run can resume",
        "makes checkpoints three times as large",
        flags=("--resumable/--weights-only",),
    )
    trust_remote_code: bool = setting(
        False,
        "run code that comes with the model; only for models that you trust",
        "must be given on each command line; a settings file or run folder can only request it",
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
        for name, definition in SETTINGS.items():
            value, words = getattr(self, name), name.replace("_", " ")
            if definition.choices and value not in definition.choices:
                raise UserError(f"unknown {words} {value!r}: use one of {', '.join(definition.choices)}")
            if definition.limit and value is not None and not definition.limit.allows(value):
                raise UserError(f"{words} is {value}: give {definition.limit.wanted}")
        if strategy.is_one_process and self.ranks != 1:
            raise UserError(f"{self.strategy} runs in one process, but ranks is {self.ranks}: use ddp or a ZeRO stage")

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @classmethod
    def course(cls, strategy: str = "vanilla", **changes: Any) -> RunConfig:
        """The small preset, `presets/course.yaml`.

        `MINISFT_COURSE_STEPS` overrides its number of steps.
        """
        return cls.from_preset("course", strategy=strategy, **changes)

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> RunConfig:
        """The settings of a preset, overridden by `changes`.

        Raises `UserError` for an unknown preset.
        """
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
        """The settings of a YAML file or of a run's `run.json`, overridden by `changes`.

        Raises `UserError` if the file cannot be read, or holds unknown or unusable settings.
        """
        values = read_values(user_path(file))
        if values.pop("trust_remote_code", False) is not False and not changes.get("trust_remote_code"):
            note(f"{one_line(file)} requests to run code of the model: give --trust-remote-code if you trust it")
        return cls._from_values(values, changes, Path(file))

    @classmethod
    def _from_values(cls, values: dict[str, Any], changes: dict[str, Any], file: Path) -> RunConfig:
        """Combine the checked `values` of a file with `changes`, which take precedence."""
        require_known(values.keys() - {GLOBAL_BATCH})
        global_batch = values.pop(GLOBAL_BATCH, None)
        settings = checked(values, values_shape(), file) | changes
        is_one_process = strategy_named(settings.get("strategy", "vanilla")).is_one_process
        if is_one_process and "ranks" not in changes and ("strategy" in changes or settings.get("ranks") is None):
            settings["ranks"] = 1  # the ranks of the file are for other strategies
        elif settings.get("ranks") is None:
            settings["ranks"] = usual_ranks()
        if global_batch is not None and "batch_size" in values:
            raise UserError(f"{one_line(file)} has both {GLOBAL_BATCH} and batch_size: remove one of the two")
        config = cls(**settings)
        if global_batch is None or "batch_size" in changes:
            return config
        if not isinstance(global_batch, int) or isinstance(global_batch, bool) or global_batch < 1:
            raise UserError(f"{one_line(file)}: {GLOBAL_BATCH} is {global_batch!r}: give a number of rows, at least 1")
        per_rank = max(1, global_batch // (config.accumulation * config.ranks))
        config = dataclasses.replace(config, batch_size=per_rank)
        if config.global_batch != global_batch:
            note(
                f"The global batch is {config.global_batch} rows, not {global_batch}: {config.ranks} ranks x "
                f"{config.accumulation} micro-batches do not divide {global_batch}"
            )
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path = Path("run.json")) -> RunConfig:
        """The settings `values`, read from `file`.

        Raises `UserError` for unknown names, wrong types and unusable values.
        """
        require_known(values)
        return checked(values, cls, file)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def values_that_shape_rows(self) -> dict[str, Any]:
        """The settings that determine the prepared rows."""
        return {name: getattr(self, name) for name, definition in SETTINGS.items() if definition.shapes_rows}


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in dataclasses.fields(RunConfig)}


def require_known(names: Iterable[str]) -> None:
    """Raise `UserError` if one of `names` is not a setting."""
    if unknown := set(names) - set(SETTINGS):
        raise UserError(
            f"unknown run settings {one_line(', '.join(sorted(unknown)), 200)}: use {', '.join(sorted(SETTINGS))}"
        )


@functools.cache
def values_shape() -> Any:
    """The type of a mapping from setting names to values, any of which may be missing."""
    make: Any = TypedDict  # type checkers accept only a literal dictionary of fields
    return make("values_shape", get_type_hints(RunConfig), total=False)


@functools.cache
def preset_values(preset: str) -> dict[str, Any]:
    return read_values(PRESETS / f"{preset}.yaml")


def usual_ranks() -> int:
    """One rank per GPU; two on a CPU, enough to see ZeRO partition the states."""
    import torch

    return torch.cuda.device_count() or 2


def require_utf8(what: str, path: str) -> None:
    """Raise `UserError` if `path` is not UTF-8, as the libraries for reading data require."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {one_line(path)} has bytes that are not UTF-8 in its name: rename it") from None
