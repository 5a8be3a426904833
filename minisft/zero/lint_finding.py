"""A finding of the linter, and how a value and a misspelt key are shown in it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minisft.text import one_line


@dataclass(frozen=True)
class Finding:
    """One thing in a configuration. `error`: DeepSpeed refuses it, or does not do what it says; else a `warning`."""

    severity: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {one_line(self.key, 200)}: {one_line(self.message)}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def display_value(value: Any) -> str:
    """A value as it is in the file, on one line and cut where it is long."""
    return one_line(json.dumps(value), 60)


def meant(key: str, known: Iterable[str], otherwise: str = "no such key is known") -> str:
    """The end of a sentence about an unknown key: the known one that is spelt most like it."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75) if len(key) < 80 else []
    return f": did you mean {close[0]}?" if close else f": {otherwise}"
