"""Builds the C++ operator through which DeepSpeed's CPU ranks communicate, once per environment.

    python -m minisft.launch.cpu_comm_op

PyTorch builds such an operator at its first use, into one folder for all environments of a user.
The build contains the paths and tools of one environment, so two environments used in turn would
rebuild it each time, for half a minute or more. Here each environment has its own folder.

While a process builds or loads the operator, a lock file makes other processes wait. A process that
is killed leaves the file behind, and every later process would wait forever: `remove_stale_locks`
removes the lock files that no living process holds open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from minisft.system import skip_accelerator_search
from minisft.text import one_line

FOLDER = "TORCH_EXTENSIONS_DIR"  # environment variable that tells PyTorch the folder


def extensions_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder for operators: that of the variable, else one inside this environment.

    Returns None if the variable is not set and the environment is read-only.
    """
    if variable := environment.get(FOLDER):
        return Path(variable)
    return Path(sys.prefix) / "torch_extensions" if os.access(sys.prefix, os.W_OK) else None


def build_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of a build in that folder with this environment's ninja."""
    folder = extensions_folder(environment)
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return {"PATH": path} | ({FOLDER: str(folder)} if folder else {})


def remove_stale_locks(folder: Path | None) -> list[Path]:
    """Remove the lock files in `folder` that no process holds open; return their paths."""
    locks = list(folder.glob("*/lock")) if folder else []
    open_files = _open_files() if locks else set()
    stale = [lock for lock in locks if os.path.realpath(lock) not in open_files]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def use_own_folder() -> None:
    """Let this process build and load the operator in that folder, without waiting for stale locks."""
    os.environ.update(build_environment())
    remove_stale_locks(extensions_folder())


def _open_files() -> set[str]:
    """Return the paths of the files that processes of this machine hold open, as far as we may inspect them."""
    import psutil

    paths = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            paths |= {opened.path for opened in process.open_files()}
    return paths


def main() -> None:
    """Build the operator now, so that the first run need not wait.

    Runs do without it if there is no compiler.
    """
    skip_accelerator_search()
    use_own_folder()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    try:
        ShareMemCommBuilder().load(verbose=False)
    except Exception as error:  # a compiler can fail in many ways
        sys.exit(f"DeepSpeed's CPU operator could not be built: {one_line(error)[-300:]}")


if __name__ == "__main__":
    main()
