"""The metadata of a field of `RunConfig`: help, reason, choices and limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limit:
    """A condition on a value, and the words in which an error describes it."""

    allows: Callable[[Any], bool]
    wanted: str


AT_LEAST_1 = Limit(lambda value: value >= 1, "at least 1")
AT_LEAST_2_TOKENS = Limit(lambda value: value >= 2, "at least 2 tokens")
POSITIVE = Limit(lambda value: math.isfinite(value) and value > 0, "a positive number")
NOT_NEGATIVE = Limit(lambda value: math.isfinite(value) and value >= 0, "0 or a positive number")
FRACTION = Limit(lambda value: 0 <= value < 1, "a fraction from 0 to 1")
COUNT_OR_NONE = Limit(lambda value: 0 <= value <= 10**9, "0 for none, or a number of test rows")
SEED = Limit(lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Setting:
    """Metadata of one field of `RunConfig`.

    `shapes_rows` marks the settings that determine the prepared rows. `flags` replaces the usual
    name of the command-line option.
    """

    help: str
    reason: str = ""
    choices: Collection[str] = ()
    limit: Limit | None = None
    shapes_rows: bool = False
    flags: tuple[str, ...] = ()


def setting(default: Any, help: str, reason: str = "", **options: Any) -> Any:
    """A dataclass field with this default, and a `Setting` as its metadata."""
    return field(default=default, metadata={"setting": Setting(help, reason, **options)})
