"""Whatever is killed, halted or broken: every process of a run ends, its lock is free, and it says what happened.

Each fault strikes a real run: of two DeepSpeed ranks, or of one process where it strikes whoever started the run.
`MINISFT_CHAOS=20` repeats each so many times, with two ranks throughout, and strikes more of them in more ways
(`tests/benchmarks/chaos.py` counts them).
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import AT_LENGTH, at_length, write_sharegpt

from minisft.errors import UserError
from minisft.launch.guardian import HANDOVER
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.run.folder import Run
from minisft.training.heartbeat import read_heartbeats

pytestmark = [pytest.mark.distributed, pytest.mark.chaos]
REPEATS = int(os.environ.get("MINISFT_CHAOS", "1"))
each_time = {"params": range(REPEATS), "ids": lambda repeat: f"time{repeat + 1}"}
LIGHT = "zero2" if AT_LENGTH else "vanilla"  # to the supervisor, the one is like the other
SOON = 5.0  # seconds in which everything is gone
STARTER = """
import sys
from minisft.launch.launch_run import launch
from minisft.run.folder import Run
launch(Run.load(sys.argv[1]), heartbeat_timeout=float(sys.argv[2]))
"""


def name_of(value):
    return value.name if isinstance(value, signal.Signals) else None


def prepared_run(tiny_model, tmp_path, strategy="zero2"):
    data = write_sharegpt(tmp_path / "many.json", 400)
    endless = {"max_steps": 100_000, "save_steps": 100_000, "max_characters": None}
    return prepare(RunConfig.course(strategy, model=str(tiny_model), data=str(data), **endless), say=lambda line: None)


@pytest.fixture(**each_time)
def prepared(request, tiny_model, tmp_path):
    return prepared_run(tiny_model, tmp_path)


@pytest.fixture(**each_time)
def prepared_light(request, tiny_model, tmp_path):
    return prepared_run(tiny_model, tmp_path, LIGHT)


class Victim:
    """A run under way, and all of its processes."""

    def __init__(self, run, process):
        self.run, self.process = run, process
        wait_until(lambda: len(run.metrics) > 2, process)
        self.family = psutil.Process(process.pid).children(recursive=True)
        self.ranks = [psutil.Process(sign.pid) for sign in read_heartbeats(run.folder)]
        assert len(self.ranks) == run.config.ranks
        words = run.command.split()
        self.port = int(words[words.index("--master_port") + 1]) if "--master_port" in words else None

    def process_of(self, program):
        named = [p for p in self.family if program in " ".join(p.cmdline())]
        (found,) = [p for p in named if p.ppid() not in {other.pid for other in named}]  # not a fork of it
        return found

    @property
    def supervisor(self):
        return self.process_of("minisft.launch.supervisor")

    def everything_is_gone(self, within=SOON):
        alive = psutil.wait_procs(self.family, timeout=within)[1]
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if self.port:
            with socket.socket() as probe:  # raises if somebody still listens
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))
            assert not list(Path("/dev/shm").glob(f"*_{self.port}_*"))
        wait_until(lambda: self.run.status == "failed")
        assert not (self.run.folder / "DONE").exists()

    def says(self, pattern):
        assert re.search(pattern, self.run.failure["reason"]), self.run.failure
        output, _ = self.process.communicate(timeout=10)
        assert re.search(pattern, output.splitlines()[-1])


def wait_until(happens, process=None, within=300):
    deadline = time.monotonic() + within
    while not happens():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def heed_signals():
    """As in a terminal, wherever these tests were started from: under nohup or in the background some are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(run, heartbeat_timeout=60.0):
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", STARTER, str(run.folder), str(heartbeat_timeout)],  # its error comes last
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_signals,
    )
    try:
        return Victim(run, process)
    except BaseException:
        process.terminate()  # the starter ends its run
        process.communicate()
        raise


@pytest.fixture
def victim(prepared):
    victim = started(prepared)
    yield victim
    end(victim)


@pytest.fixture
def light_victim(prepared_light):
    victim = started(prepared_light)
    yield victim
    end(victim)


def end(victim):
    for process in (*victim.family, psutil.Process(victim.process.pid) if victim.process.poll() is None else None):
        with suppress(psutil.NoSuchProcess, AttributeError):
            process.kill()
    victim.process.communicate()


def test_the_starter_is_killed(light_victim):
    light_victim.process.kill()
    light_victim.everything_is_gone()
    assert light_victim.run.failure["reason"] == "the process that started it is gone"


@pytest.mark.parametrize("repeat", each_time["params"], ids=each_time["ids"])
@pytest.mark.parametrize("strategy", [pytest.param("vanilla", marks=at_length), "ddp"])
def test_other_launchers_end_as_well(tiny_model, tmp_path, strategy, repeat):
    victim = started(prepared_run(tiny_model, tmp_path, strategy))
    try:
        victim.process.kill()
        victim.everything_is_gone()
    finally:
        end(victim)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=at_length) for number in (signal.SIGINT, signal.SIGHUP))],
    ids=name_of,
)
def test_the_starter_is_interrupted(light_victim, number):
    victim, name = light_victim, light_victim.run.name
    for start_again in (lambda: prepare(victim.run.config, overwrite=True), lambda: launch(victim.run)):
        with pytest.raises(UserError, match="being trained right now"):
            start_again()
    assert victim.process.poll() is None
    victim.process.send_signal(number)
    victim.everything_is_gone()
    assert victim.run.failure["reason"] == f"stopped by {number.name}"
    output, _ = victim.process.communicate(timeout=10)
    interrupted = number == signal.SIGINT
    expected = f"KeyboardInterrupt: {name} was stopped" if interrupted else f"RunFailed: {name} failed: stopped"
    assert expected in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "number"),
    [
        ("bin/deepspeed", signal.SIGTERM),
        ("deepspeed.launcher.launch", signal.SIGKILL),
        pytest.param("bin/deepspeed", signal.SIGKILL, marks=at_length),
        pytest.param("deepspeed.launcher.launch", signal.SIGTERM, marks=at_length),
    ],
    ids=name_of,
)
def test_a_launcher_is_killed(victim, program, number):
    victim.process_of(program).send_signal(number)
    victim.everything_is_gone(within=SOON + 5)
    victim.says("launcher ended|ended without a word")


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGTERM, marks=at_length),
        pytest.param(0, signal.SIGKILL, marks=at_length),
        pytest.param(1, signal.SIGTERM, marks=at_length),
    ],
    ids=name_of,
)
def test_a_rank_is_killed(victim, rank, number):
    victim.ranks[rank].send_signal(number)
    victim.everything_is_gone(within=2 * SOON + 5)
    assert victim.run.failure["rank"] == rank
    victim.says("ended without a word")


def test_a_rank_hangs(prepared):
    victim = started(prepared, heartbeat_timeout=4)
    try:
        victim.ranks[1].suspend()
        victim.everything_is_gone(within=4 + 2 * SOON)
        assert victim.run.failure["rank"] == 1
        victim.says("no sign of life for 4 s")
    finally:
        end(victim)


def test_the_supervisor_is_killed(victim):
    victim.supervisor.kill()
    victim.everything_is_gone(within=2 * SOON)
    victim.says("the supervisor was killed")


def test_a_crash_at_import(prepared, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'minisft.training.checkpoints' and os.environ.get('LOCAL_RANK') == '1':\n"
        "            raise ImportError('libbroken.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(RunFailed, match=r"ImportError: libbroken.so.1: cannot open .*launcher.log"):
        launch(prepared, say=lambda line: None)
    assert not [p for p in psutil.Process().children(recursive=True) if "minisft" in " ".join(p.cmdline())]


def test_two_runs_at_once_do_not_disturb_each_other(prepared, victim):
    """The second one is of another name; it fails, and the first goes on."""
    config = RunConfig.from_dict(prepared.config.to_dict() | {"name": "other"})
    other = started(prepare(config, say=lambda line: None))
    assert other.port != victim.port
    other.ranks[0].kill()
    other.everything_is_gone(within=2 * SOON + 5)
    end(other)
    before = len(victim.run.metrics)
    wait_until(lambda: len(victim.run.metrics) > before + 2, victim.process)
    victim.process.send_signal(signal.SIGINT)
    victim.everything_is_gone()


# --- two at once, so that nobody is left who could tell -----------------------------------------------------


@pytest.mark.attack("11")
def test_the_starter_is_stopped_and_the_supervisor_killed(light_victim):
    light_victim.process.send_signal(signal.SIGSTOP)
    light_victim.supervisor.kill()
    light_victim.everything_is_gone()
    assert light_victim.run.failure["reason"] == "the supervisor was killed"


@pytest.mark.attack("11")
def test_both_are_killed_and_their_parent_does_not_wait_for_them(victim):
    supervisor = victim.supervisor
    victim.process.send_signal(signal.SIGSTOP)  # it cannot wait for the supervisor, which stays a zombie
    supervisor.kill()
    victim.process.send_signal(signal.SIGKILL)  # nobody waits for this one until the test ends
    victim.everything_is_gone()
    assert psutil.Process(victim.process.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.attack("11")
@pytest.mark.parametrize("strategy", ["vanilla", pytest.param("ddp", marks=at_length), "zero2"])
def test_stopped_ranks_end_when_both_are_killed(tiny_model, tmp_path, strategy):
    victim = started(prepared_run(tiny_model, tmp_path, strategy))
    try:
        for rank in victim.ranks:
            rank.suspend()
        victim.supervisor.kill()
        victim.process.kill()
        victim.everything_is_gone()
    finally:
        end(victim)


@pytest.mark.attack("11")
def test_a_stopped_supervisor_ends_with_its_starter(light_victim):
    light_victim.supervisor.suspend()
    light_victim.process.kill()
    light_victim.everything_is_gone(within=HANDOVER + SOON)


def can_write(process):
    """Whether a process may still write into a file; one without memory, on its way to its end, runs no more."""
    with suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and bool(process.cmdline())
    return False


@pytest.mark.attack("11")
def test_the_lock_is_held_until_every_rank_is_gone(light_victim):
    """A folder is not free for the next run while a rank of the last one may still write into it."""
    for rank in light_victim.ranks:
        rank.suspend()
    light_victim.supervisor.kill()
    light_victim.process.kill()
    wait_until(lambda: not light_victim.run.live)
    assert not any(map(can_write, light_victim.ranks))


@pytest.mark.attack("11")
@pytest.mark.parametrize("closed", [">&-", pytest.param("<&- >&- 2>&-", marks=at_length)])
def test_closed_streams_disturb_no_run(tiny_model, small_data, own_outputs, closed):
    words = [sys.executable, "-P", "-m", "minisft.cli", "launch", "-s", "vanilla", "-m", tiny_model, "-d", small_data]
    line = f'exec {closed}; exec "$@"'
    done = subprocess.run(["bash", "-c", line, "bash", *map(str, words), "--max-steps", "3"], timeout=120)
    assert done.returncode == 0
    assert Run(own_outputs / "model" / "vanilla").status == "done"


@pytest.mark.attack("11")
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_a_port_that_is_taken_is_named(tiny_model, tmp_path, monkeypatch, strategy):
    from minisft.launch import commands

    run = prepared_run(tiny_model, tmp_path, strategy)
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        monkeypatch.setattr(commands, "_free_port", lambda: holder.getsockname()[1])
        with pytest.raises(RunFailed, match="the port was taken by another process"):
            launch(run, say=lambda line: None)


@pytest.mark.attack("2")
@pytest.mark.parametrize("strategy", ["vanilla", "ddp", "zero2"])
def test_no_process_of_a_run_imports_a_module_of_the_current_folder(tiny_model, small_data, tmp_path, strategy):
    place = tmp_path / "hostile"
    place.mkdir()
    for module in ("psutil", "torch", "transformers", "deepspeed", "numpy", "json", "pip", "sitecustomize"):
        (place / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({module!r})\nexit(1)\n")
    words = [sys.executable, "-P", "-m", "minisft.cli", "launch", "-s", strategy, "-m", tiny_model, "-d", small_data]
    command = [*map(str, words), "--max-steps", "2"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    imported = (tmp_path / "ran").read_text() if (tmp_path / "ran").exists() else ""
    assert (done.returncode, imported) == (0, ""), done.stderr


# --- from a notebook's kernel ------------------------------------------------------------------------------


@pytest.fixture
def kernel():
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def in_cell(run, kernel, how):
    """The run under way, started in a cell: by `launch`, or by a shell command."""
    manager, client = kernel
    environment = {"MINISFT_OUTPUTS": os.environ["MINISFT_OUTPUTS"], "HF_HUB_OFFLINE": "1"}
    client.execute(f"import os; os.environ.update({environment})", reply=True)
    cells = {
        "launch": f"from minisft.launch.launch_run import launch, Run\nlaunch(Run.load({str(run.folder)!r}))",
        "shell": f"!{sys.executable} -m minisft.cli train {run.folder}",
    }
    client.execute(cells[how])
    wait_until(lambda: len(run.metrics) > 2)
    pid = manager.provisioner.pid
    stand_in = type("Process", (), {"pid": pid, "poll": lambda self: None, "communicate": lambda self: None})()
    return Victim(run, stand_in)


@pytest.mark.parametrize("how", ["launch", pytest.param("shell", marks=at_length)])
def test_the_cell_is_interrupted(prepared_light, kernel, how):
    victim = in_cell(prepared_light, kernel, how)
    kernel[0].interrupt_kernel()
    victim.everything_is_gone()
    assert victim.run.failure["reason"] == "stopped by SIGINT"
    assert kernel[0].is_alive()
    assert Run.load(prepared_light.folder).status == "failed"


@pytest.mark.parametrize("how", ["launch", pytest.param("shell", marks=at_length)])
def test_the_kernel_is_restarted(prepared_light, kernel, how):
    victim = in_cell(prepared_light, kernel, how)
    kernel[0].restart_kernel(now=False)
    victim.everything_is_gone(within=2 * SOON)


@pytest.mark.parametrize("how", [pytest.param("launch", marks=at_length), "shell"])
def test_the_kernel_is_killed(prepared, kernel, how):
    victim = in_cell(prepared, kernel, how)
    os.kill(kernel[0].provisioner.pid, signal.SIGKILL)
    victim.everything_is_gone(within=2 * SOON)
