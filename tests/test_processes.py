"""Child processes: none imports a module of the current folder, and none outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import minisft
from minisft import processes
from minisft.processes import lives, marked

HOSTILE = ("psutil", "pip", "torch", "transformers", "deepspeed", "numpy", "json", "minisft")


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """The current folder, full of modules that leave a mark when they are imported."""
    place = tmp_path / "hostile"
    place.mkdir()
    for module in HOSTILE:
        (place / f"{module}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({module!r})\nraise SystemExit(1)\n"
        )
    monkeypatch.chdir(place)
    return place


@pytest.mark.attack("2")
@pytest.mark.parametrize("path", [None, "", ":", ".", "relative", ":/nowhere"])
def test_no_module_of_the_current_folder_is_imported(hostile_folder, tmp_path, monkeypatch, path):
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    code = "import json, psutil, subprocess, sys; print(json.__file__)\n"
    # What it starts in turn, as DeepSpeed's and PyTorch's launchers do, without -P.
    code += "subprocess.run([sys.executable, '-m', 'json.tool', '--help'], check=True, stdout=subprocess.DEVNULL)\n"
    code += "subprocess.run([sys.executable, '-c', 'import psutil, json'], check=True)\n"
    done = processes.run(processes.python("-c", code))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.attack("2")
def test_every_python_is_started_in_one_place():
    """`sys.executable` runs a program only through `processes.python`; elsewhere it names the environment's folder."""
    for file in Path(minisft.__file__).parent.rglob("*.py"):
        if file.name != "processes.py":
            text = file.read_text(encoding="utf-8")
            assert "[sys.executable" not in text, file.name
            assert "os.system" not in text, file.name
            assert "shell=True" not in text, file.name


@pytest.mark.attack("11")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_command_ends_with_the_process_that_runs_it(number):
    code = "from minisft import processes\nprocesses.run(processes.python('-c', 'import time; time.sleep(60)'))\n"
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # behind nohup it is ignored
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], **heed)
    deadline = time.monotonic() + 20
    while not (children := psutil.Process(parent.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(10)
    assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.attack("11")
def test_a_command_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(processes.python("-c", code), timeout=1.5)
    time.sleep(0.1)
    assert not lives(int(pid.read_text()))


def test_a_zombie_does_not_live_and_a_reused_number_is_another_process():
    child = subprocess.Popen(["true"])
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not lives(child.pid)
    child.wait()
    assert not lives(child.pid)
    me = psutil.Process()
    assert lives(me.pid)
    assert lives(me.pid, me.create_time())
    assert not lives(me.pid, me.create_time() - 60)


def test_what_carries_a_mark_is_found_whoever_its_parent_is():
    child = subprocess.Popen(["sleep", "60"], env=os.environ | {"MARKED_FOR_A_TEST": "this"})
    try:
        assert [process.pid for process in marked("MARKED_FOR_A_TEST", "this")] == [child.pid]
        assert marked("MARKED_FOR_A_TEST", "that") == []
    finally:
        child.kill()
        child.wait()


@pytest.mark.attack("11")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_traceback(closed, tmp_path):
    seen = tmp_path / "seen"
    code = "from minisft import cli; import sys; sys.argv = ['minisft', 'lint', '/nowhere.json']\n"
    code += f"try: cli.main()\nexcept BaseException as e: open({str(seen)!r}, 'w').write(repr(e))\n"
    subprocess.run(["bash", "-c", f'exec {closed}; exec "$0" -P -c "$1"', sys.executable, code], timeout=60)
    assert seen.read_text() == "SystemExit(2)"
