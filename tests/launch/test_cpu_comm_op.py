"""Locks that a killed build leaves behind."""

import subprocess
import sys
from pathlib import Path

from minisft.launch.cpu_comm_op import build_environment, extensions_folder, remove_stale_locks


def test_only_locks_that_nobody_holds_are_removed(tmp_path):
    held, stale = (tmp_path / name / "lock" for name in ("held", "stale"))
    for lock in (held, stale):
        lock.parent.mkdir()
    stale.touch()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os; os.open({str(held)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert remove_stale_locks(tmp_path) == [stale]
    assert held.exists()
    holder.kill()  # as a rank that dies while it builds
    holder.communicate()
    assert remove_stale_locks(tmp_path) == [held]
    assert remove_stale_locks(tmp_path / "none") == remove_stale_locks(None) == []


def test_every_environment_builds_for_itself_unless_told_where():
    found = build_environment({"PATH": "/somewhere"})
    assert found["TORCH_EXTENSIONS_DIR"] == str(Path(sys.prefix) / "torch_extensions")
    assert found["PATH"].split(":") == [str(Path(sys.executable).parent), "/somewhere"]
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/elsewhere"}) == Path("/elsewhere")
