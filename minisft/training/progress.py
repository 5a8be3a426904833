"""What a run tells its user: lines of a standard logger, kept in `logs/progress.txt` of the run folder.

Rank 0 logs to `progress`. Whoever launched the run shows each line that is added to the file, so
output of launchers, libraries and data, which goes to other files, never passes for one. A run that
was started by hand has no supervisor: there the lines go to its terminal as well.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TextIO

from minisft.files import open_own
from minisft.text import harmless

PROGRESS = "logs/progress.txt"  # in a run folder

progress = logging.getLogger(__name__)


class _Harmless(logging.Formatter):
    """Escapes what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def log_progress(run_folder: Path, terminal: TextIO | None = None) -> None:
    """From now on, append what `progress` logs to the run's file, and show it on `terminal` if given."""
    handle = open_own(run_folder / PROGRESS, os.O_WRONLY | os.O_APPEND, private=True)
    file = os.fdopen(handle, "a", encoding="utf-8")
    progress.handlers = [logging.StreamHandler(stream) for stream in (file, terminal) if stream is not None]
    for handler in progress.handlers:
        handler.setFormatter(_Harmless())
    progress.setLevel(logging.INFO)
    progress.propagate = False
