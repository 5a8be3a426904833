"""The entry point of the command line: a mistake that the user can correct ends with one sentence.

Exit codes: 0 success, 1 failed run or check, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from pathlib import Path

import typer

from minisft.cli import data_verbs, model_verbs, run_verbs  # noqa: F401 (each registers its commands)
from minisft.cli.options import app, complain
from minisft.errors import UserError
from minisft.processes import open_standard_streams
from minisft.text import note, one_line


def main() -> None:
    """Run the command line and exit; a mistake that the user can correct exits with code 2."""
    open_standard_streams()
    os.environ.pop("MPLBACKEND", None)  # figures are drawn to files; an invalid name would make matplotlib fail
    warnings.showwarning = lambda message, category, *_: note(f"{category.__name__}: {one_line(message)}")
    for stream in (sys.stdout, sys.stderr):  # the option parser may print characters that the locale lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _require_a_folder()
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="minisft", standalone_mode=False))
    except UserError as error:
        _stop(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        at_path = f" at {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "no space left on device" if error.errno != errno.EFBIG else "a file would be larger than allowed"
            _stop(f"{what}{at_path}: free some, or point MINISFT_CACHE and MINISFT_OUTPUTS elsewhere")
        _stop(f"{(error.strerror or str(error)).lower()}{at_path}: check the path and your permissions")
    except Exception as error:
        if not hasattr(error, "format_message"):  # only the option parser's errors about a wrong call have it
            raise
        _stop(f"{error.format_message().rstrip('.')} (see minisft {' '.join(sys.argv[1:2])} --help)")


def _require_a_folder() -> None:
    """Raise `UserError` if the current folder has been removed: relative paths would fail."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed: change to another one") from None


def _stop(reason: object) -> None:
    complain(reason)
    sys.exit(2)
