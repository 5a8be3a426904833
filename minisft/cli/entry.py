"""The entry point: every mistake that a user can correct ends in one sentence and exit code 2.

Exit code 0 is success, 1 a failed run, 2 bad usage or bad input.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from pathlib import Path

import typer

from minisft.cli import data_verbs, model_verbs, run_verbs  # noqa: F401 (each registers its verbs)
from minisft.cli.options import app, complain
from minisft.errors import UserError
from minisft.processes import open_standard_streams
from minisft.text import note, one_line


def main() -> None:
    """Run the command line; every mistake that a user can correct ends in one sentence and exit code 2."""
    open_standard_streams()
    os.environ.pop("MPLBACKEND", None)  # figures are drawn to files; a wrong name would stop matplotlib
    warnings.showwarning = lambda message, category, *_: note(f"{category.__name__}: {one_line(message)}")
    for stream in (sys.stdout, sys.stderr):  # what the option parser prints may have characters that a locale lacks
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
        place = f" at {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "no space left on device" if error.errno != errno.EFBIG else "a file would be larger than allowed"
            _stop(f"{what}{place}: free some, or point MINISFT_CACHE and MINISFT_OUTPUTS elsewhere")
        _stop(f"{(error.strerror or str(error)).lower()}{place}: check the path, and that you may read and write there")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the option parser raises for a mistake in the call
            raise
        _stop(f"{error.format_message().rstrip('.')} (see minisft {' '.join(sys.argv[1:2])} --help)")


def _require_a_folder() -> None:
    """Paths mean something only while the folder that they start from is there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed: change to another one") from None


def _stop(reason: object) -> None:
    complain(reason)
    sys.exit(2)
