"""A run over two hosts, with DeepSpeed's real launcher for each: it computes what one host computes, and fails as one.

Both hosts are this machine, under two of its loopback addresses; where network namespaces can be made, two of those
with an address of their own each, joined by a cable.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from minisft.errors import UserError
from minisft.launch.commands import commands, explain, slurm_script
from minisft.launch.hosts import LAUNCHERS, Host, Place
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.training.heartbeat import read_heartbeats

pytestmark = pytest.mark.distributed
HERE = Place((Host("127.0.0.1", 1), Host("127.0.0.2", 1)))
STEPS = 6


def quiet(line):
    pass


SETTINGS = {"max_steps": STEPS, "save_steps": 4, "max_characters": None, "resumable": True, "eval_rows": 0}


@pytest.fixture
def config(tiny_model, small_data):
    def make(name, **changes):
        return RunConfig.course("zero2", name=name, model=str(tiny_model), data=str(small_data), **(SETTINGS | changes))

    return make


@pytest.fixture(scope="module")
def one_host(tiny_model, small_data, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MINISFT_OUTPUTS", str(tmp_path_factory.mktemp("one-host")))
    about = SETTINGS | {"model": str(tiny_model), "data": str(small_data)}
    run = launch(prepare(RunConfig.course("zero2", **about), say=quiet), say=quiet)
    patch.undo()
    return [m["loss"] for m in run.metrics]


def test_two_hosts_compute_what_one_computes(config, one_host):
    run = launch(prepare(config("two"), place=HERE, say=quiet), say=quiet)
    assert [m["loss"] for m in run.metrics] == pytest.approx(one_host, rel=1e-6)
    assert [(sign.rank, sign.host) for sign in read_heartbeats(run.folder)] == [(0, "127.0.0.1"), (1, "127.0.0.2")]
    assert len(run.command.splitlines()) == 2
    assert (run.folder / "hostfile").read_text() == "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"


def test_the_end_of_one_hosts_ranks_fails_the_run_on_the_other_and_it_can_go_on(config, one_host, monkeypatch):
    config = config("two")
    run = prepare(config, place=HERE, say=quiet)

    def kill_second_host():
        while len(run.metrics) < 5:  # the lines that `launch` shows come too late: the steps are short
            time.sleep(0.005)
        second = next(sign for sign in read_heartbeats(run.folder) if sign.host == "127.0.0.2")
        psutil.Process(psutil.Process(second.pid).ppid()).send_signal(signal.SIGSTOP)  # its launcher cannot tidy up
        psutil.Process(second.pid).kill()

    threading.Thread(target=kill_second_host, daemon=True).start()
    with pytest.raises(RunFailed, match=r"two failed on rank 1, step \d: process \d+ ended without a word"):
        launch(run, say=quiet)
    assert run.checkpoints
    said = []
    resumed = launch(prepare(config, place=HERE, say=said.append), say=said.append)
    assert "resuming from checkpoint-4" in said
    assert [m["loss"] for m in resumed.metrics] == pytest.approx(one_host, rel=1e-6)


@pytest.mark.parametrize("strategy", ["vanilla", "ddp"])
def test_only_deepspeed_goes_beyond_one_machine(config, strategy):
    one = RunConfig.from_dict(
        config("x").to_dict() | {"strategy": strategy, "ranks": 1 if strategy == "vanilla" else 2}
    )
    with pytest.raises(UserError, match=rf"{strategy} runs on one machine: .* use zero0"):
        prepare(one, place=HERE, say=quiet)


def test_a_run_that_somebody_else_starts_is_not_launched(config):
    run = prepare(config("two"), place=Place(HERE.hosts, "none"), say=quiet)
    with pytest.raises(UserError, match="waits to be started on its hosts"):
        launch(run, say=quiet)


def test_a_hosts_command_reaches_it_through_ssh_in_one_piece(config, tmp_path):
    """What ssh hands to the other host's shell means, there, exactly the words that were meant."""
    folder = tmp_path / "a b; $(touch harm) 'c'\n"
    local, there = commands(config("two"), folder, Place((Host("127.0.0.1", 1), Host("worker-1", 1))))
    assert local.words[0] == "deepspeed"
    assert there.words[:5] == ["ssh", "-o", "BatchMode=yes", "--", "worker-1"]
    words = shlex.split(there.words[5])
    assert words[0] == "cd"
    assert words[2:5] == ["&&", "exec", "env"]
    assert words[-1] == str(folder)
    assert words[words.index("deepspeed") + 1 : words.index("--module")] == [
        *("--hostfile", str(folder / "hostfile"), "--no_ssh", "--node_rank", "1", "--master_addr", "127.0.0.1"),
        *("--master_port", words[words.index("--master_port") + 1]),
    ]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_word_that_starts_a_host_is_explained(config, tmp_path, launcher):
    place = Place((Host("127.0.0.1", 1), Host("worker-1", 1)), launcher)
    for command in commands(config("two"), tmp_path, place):
        words = shlex.split(str(command))
        assert [word for part in explain(words) for word in part.words] == words


def test_pdsh_gets_no_path_that_it_would_break(config, tmp_path):
    with pytest.raises(UserError, match=r"pdsh would break the path .*--launcher ssh"):
        commands(config("two"), tmp_path / "a b", Place(HERE.hosts, "pdsh"))


def test_a_slurm_job_is_one_launcher_per_node_under_one_supervisor(config, one_host, tmp_path, monkeypatch):
    """The script itself, run by bash; stand-ins for SLURM's programs, which do on this machine what they would do."""
    run = prepare(config("two"), say=quiet)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames two-nodes" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n'
    )
    (programs / "srun").write_text(
        '#!/bin/sh\n[ "$1 $2 $3 $4" = "--nodes=1 --ntasks=1 --overlap --nodelist" ] || exit 9\nshift 5\nexec "$@"\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(slurm_script(run.config, run.folder, 2, on_gpu=False))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "two-nodes")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["loss"] for m in run.metrics] == pytest.approx(one_host, rel=1e-6)
    assert [sign.host for sign in read_heartbeats(run.folder)] == ["127.0.0.1", "127.0.0.2"]
    assert run.command.count("srun --nodes=1 --ntasks=1") == 2


def test_a_slurm_script_asks_for_what_the_run_needs(config):
    run = prepare(config("two", ranks=4), say=quiet)
    script = slurm_script(run.config, run.folder, 2, on_gpu=True)
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=2", "#SBATCH --ntasks-per-node=1"} <= set(script.splitlines())
    for nodes in (3, 0, 8):
        with pytest.raises(UserError, match="evenly"):
            slurm_script(run.config, run.folder, nodes, on_gpu=True)


# --- two network namespaces --------------------------------------------------------------------------------


ADDRESSES, DEVICE = ("10.213.7.1", "10.213.7.2"), "sft0"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def namespaces():
    """Two hosts with an address each, joined by a cable; skipped where this machine allows none."""
    names = ("minisft-a", "minisft-b")
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("there is no ip command here")
    try:
        if any(one.returncode for one in made):
            pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}")
        link = ("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        if (done := ip(*link)).returncode:
            pytest.skip(f"no virtual cable here: {done.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", DEVICE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield dict(zip(ADDRESSES, names, strict=True))
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_with_addresses_of_their_own(config, one_host, namespaces):
    """Each host's line of `command.txt` is started there, as by hand: the launcher's `--no_ssh` path."""
    place = Place(tuple(Host(address, 1) for address in namespaces), "none")
    run = prepare(config("two"), place=place, say=quiet)
    started = []
    for host, line in zip(place.hosts, run.command.splitlines(), strict=True):
        variables = ["env", f"GLOO_SOCKET_IFNAME={DEVICE}"]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", namespaces[host.name], *variables, *shlex.split(line)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [m["loss"] for m in run.metrics] == pytest.approx(one_host, rel=1e-6)
    assert {sign.host for sign in read_heartbeats(run.folder)} == set(namespaces)
    assert time.time() - max(sign.changed for sign in read_heartbeats(run.folder)) < 60


@pytest.fixture
def ssh_servers(namespaces, tmp_path):
    """A real sshd on each of the two hosts, and a folder with an `ssh` that knows the way in, as a user's settings."""
    sshd, ssh, keygen = (shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("sshd", "ssh", "ssh-keygen"))
    if not (sshd and ssh and keygen):
        pytest.skip("there is no sshd here: apt install openssh-server")
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "user.pub").read_text())
    servers = []
    for address, name in namespaces.items():
        settings = {
            "ListenAddress": address,
            "HostKey": tmp_path / "host",
            "AuthorizedKeysFile": tmp_path / "authorized",
        }
        settings |= {"StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "prohibit-password", "PidFile": "none"}
        file = tmp_path / f"{name}.conf"
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        servers.append(subprocess.Popen(["ip", "netns", "exec", name, sshd, "-D", "-f", str(file)]))
    programs = tmp_path / "programs"
    programs.mkdir()
    options = ["-i", str(tmp_path / "user"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shlex.join([ssh, "-q", *options])} "$@"\n')
    (programs / "ssh").chmod(0o755)
    yield programs
    for server in servers:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_two_hosts_over_real_ssh(config, one_host, namespaces, ssh_servers, tmp_path, launcher):
    """From the first host, which reaches itself and the other by ssh alone."""
    if not shutil.which(launcher):
        pytest.skip(f"there is no {launcher} here: apt install {launcher}")
    run = prepare(config("two"), say=quiet)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    variables = [f"GLOO_SOCKET_IFNAME={DEVICE}", f"PATH={ssh_servers}:{os.environ['PATH']}"]
    command = ["ip", "netns", "exec", namespaces[ADDRESSES[0]], "env", *variables, sys.executable, "-m", "minisft.cli"]
    command += ["train", str(run.folder), "--hostfile", str(hostfile), "--launcher", launcher]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["loss"] for m in run.metrics] == pytest.approx(one_host, rel=1e-6)
    assert len(read_heartbeats(run.folder)) == 2
