"""A finding of the linter, and how it shows values and corrects the spelling of keys."""

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
    """One problem in a configuration: `error` if DeepSpeed refuses it or does not do what it says, else a `warning`."""

    severity: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {one_line(self.key, 200)}: {one_line(self.message)}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def display_value(value: Any) -> str:
    """A value as it is in the file, on one line and shortened if long."""
    return one_line(json.dumps(value), 60)


def suggest(key: str, known: Iterable[str], fallback: str = "unknown key") -> str:
    """The end of a sentence about an unknown key: the known key with the closest spelling, or `fallback`."""
    closest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75) if len(key) < 80 else []
    return f": did you mean {closest[0]}?" if closest else f": {fallback}"
