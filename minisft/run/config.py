"""`RunConfig`: every setting of a run, with its default and the reason for it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.chat.mistral import VERSIONS
from minisft.errors import UserError
from minisft.files import checked
from minisft.labels.encode_dataset import TRAIN_ON
from minisft.labels.encode_row import TRUNCATIONS
from minisft.text import one_line
from minisft.zero.strategies import STRATEGIES

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


def _require_utf8(what: str, path: str) -> None:
    """The libraries that read and write data take no other names. Raises `UserError`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {one_line(path)} has bytes that are not UTF-8 in its name: rename it") from None
