"""The small C++ operator through which DeepSpeed's CPU ranks talk: built once per environment, locked by nobody dead.

    python -m minisft.launch.cpu_comm_op

PyTorch builds such an operator at its first use, into one folder for all environments of a user, though paths and
tools of an environment are part of the build: two environments in turn would build it anew each time, for half a
minute or more. So it lies inside the environment here. While a process builds or loads, a lock file keeps others
waiting; one that is killed leaves it behind, and everybody after would wait forever. `remove_stale_locks` takes away
what no living process holds open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from minisft.text import one_line

FOLDER = "TORCH_EXTENSIONS_DIR"  # the variable by which PyTorch finds it


def extensions_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where operators are built: as the variable says, else inside this environment; None where that is read-only."""
    if named := environment.get(FOLDER):
        return Path(named)
    return Path(sys.prefix) / "torch_extensions" if os.access(sys.prefix, os.W_OK) else None


def build_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process needs to build in the right place, with this environment's ninja."""
    folder = extensions_folder(environment)
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return {"PATH": path} | ({FOLDER: str(folder)} if folder else {})


def remove_stale_locks(folder: Path | None) -> list[Path]:
    """Remove the lock files in `folder` that nobody holds any more; returns them."""
    locks = list(folder.glob("*/lock")) if folder else []
    stale = [lock for lock in locks if not _is_open(lock)] if locks else []
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_open(file: Path) -> bool:
    """Whether any process that may be looked at has `file` open; yes, where nobody can tell."""
    import psutil

    if not Path("/proc/self/fd").exists():
        return True
    try:
        wanted = file.stat()
    except FileNotFoundError:
        return False
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            for handle in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    found = handle.stat()
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        return True
    return False


def main() -> None:
    """Build it now, so that no first run has to wait for it; without a compiler runs do without."""
    os.environ.update(build_environment())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    remove_stale_locks(extensions_folder())
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    try:
        ShareMemCommBuilder().load(verbose=False)
    except Exception as error:  # a compiler can fail in many ways
        sys.exit(f"DeepSpeed's CPU operator could not be built: {one_line(error)[-300:]}")


if __name__ == "__main__":
    main()
