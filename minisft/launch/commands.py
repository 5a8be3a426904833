"""The command that trains a run: an argument list, never a shell string, and what each of its words is for."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from minisft import processes
from minisft.errors import UserError
from minisft.files import written_whole
from minisft.launch.hosts import Place, hostfile_text, travelling
from minisft.processes import SAFE_PATH
from minisft.run.config import RunConfig
from minisft.run.folder import project_root
from minisft.training.heartbeat import HOST, SUPERVISOR, SUPERVISOR_ELSEWHERE, VOICE
from minisft.zero.strategies import strategy_named

SRUN = ["srun", "--nodes=1", "--ntasks=1", "--overlap"]
HOSTFILE, ENVIRONMENT = "hostfile", "environment"  # of a run folder, where the run has several hosts
DEEPSPEED_EXPORTS = ("MLFLOW", "MV2")  # what it would put on pdsh's command line, logins included
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)  # what passes through a shell as it is

PER_DEVICE = "processes on this machine: where it has GPUs, each takes one"
RUN_FOLDER = "the run folder: everything else that the worker needs to know is in it"
MODULE = "what follows is a module of a package, not a file"
MEANINGS = {  # a word of a command: how many words belong to it, itself included, and what they are for
    "env": (1, "settings of these processes, by name"),  # and those that follow
    "python": (1, "one process, without a launcher"),
    "-m": (1, MODULE),
    "torchrun": (1, "PyTorch's launcher: starts the processes, and ends them all when one fails"),
    "--nproc_per_node": (2, PER_DEVICE),
    "deepspeed": (1, "DeepSpeed's launcher: starts the processes, and ends them all when one fails"),
    "--hostfile": (2, "the machines, and how many processes each takes"),
    "--no_ssh": (1, "start this machine's processes alone: the other machines have commands of their own"),
    "--node_rank": (2, "which of the machines this is, counted from 0"),
    "--launcher": (2, "what starts the processes on the other machines"),
    "--force_multi": (1, "through that launcher even if the hostfile names a single machine"),
    "--master_addr": (2, "the machine of rank 0, through which all find each other"),
    "srun": (6, "a step of this SLURM job, on that node alone"),
    "ssh": (6, "what this machine's processes are started with there: a connection without questions, by key"),
    "--num_accelerators": (2, PER_DEVICE),
    "--master_port": (2, "where they find each other; it was free just now, so that two runs never meet"),
    "--module": (1, MODULE),
    "minisft.training.worker": (1, "the worker"),
    "-P": (1, "no module is taken from the current folder"),
    "--prepared": (2, "what the run folder must still hold: the worker refuses one that was prepared again since"),
    "--trust-remote-code": (1, "run the code that comes with the model: you said that you trust it"),
}


@dataclass(frozen=True)
class Command:
    """A command, the variables it needs beside those that are there, and the host it is for ("" for all).

    `withheld` are variables of this process that it must not get.
    """

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    host: str = ""
    withheld: tuple[str, ...] = ()

    def __str__(self) -> str:
        variables = [f"--unset={name}" for name in self.withheld]
        variables += [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.words] if variables else self.words)


def commands(
    config: RunConfig, folder: Path, place: Place | None = None, supervised: str = "", prepared: str = ""
) -> list[Command]:
    """What starts the run in `folder`: one command, or one for each host of `place`. Every start gets a free port.

    `supervised` is the supervisor's mark: ranks on other hosts end when its sign goes. Started by hand there is none.
    With `prepared`, the `Run.identity` of the folder, the workers refuse a folder that was prepared again since.
    """
    worker = ["minisft.training.worker", *(["--prepared", prepared] if prepared else [])]
    worker += [*(["--trust-remote-code"] if config.trust_remote_code else []), display_path(folder)]
    port, ranks = str(_free_port()), str(config.ranks)
    if place is not None:
        rest = ["--master_addr", place.master, "--master_port", port, "--module", *worker]
        return _on_hosts(folder, place, rest, environment_there(supervised))
    strategy = strategy_named(config.strategy)
    if strategy.is_one_process:
        return [Command(["python", "-P", "-m", *worker])]
    if strategy.is_ddp:
        words = ["torchrun", "--nproc_per_node", ranks, "--master_port", port, "--module", *worker]
        return [Command(words, SAFE_PATH)]
    # An explicit empty hostfile keeps DeepSpeed on this machine, whatever /job/hostfile may hold.
    local = ["deepspeed", "--hostfile", "", "--num_accelerators", ranks]
    return [Command([*local, "--master_port", port, "--module", *worker], SAFE_PATH)]


def _on_hosts(folder: Path, place: Place, rest: list[str], there: dict[str, str]) -> list[Command]:
    hostfile = ["deepspeed", "--hostfile", display_path(folder / HOSTFILE)]
    if place.launcher == "pdsh":
        unsafe = [text for text in (str(folder), str(project_root()), sys.executable) if not PLAIN.fullmatch(text)]
        if unsafe:
            raise UserError(f"pdsh would break the path {unsafe[0]!r} apart: use a plainer one, or --launcher ssh")
        words = [*hostfile, "--launcher", "pdsh", "--force_multi", *rest]
        withheld = tuple(sorted(name for name in os.environ if name.startswith(DEEPSPEED_EXPORTS)))
        return [Command(words, {"DS_ENV_FILE": str(folder / ENVIRONMENT)}, withheld=withheld)]
    found = []
    for k, host in enumerate(place.hosts):
        words = [*hostfile, "--no_ssh", "--node_rank", str(k), *rest]
        if place.launcher == "srun":  # the variables of this process travel with it
            step = [*SRUN, "--nodelist", host.name, *words]
            found.append(Command(step, SAFE_PATH | {HOST: host.name}, host.name))
        elif place.launcher == "none" or host.is_here:
            found.append(Command(words, SAFE_PATH | {HOST: host.name}, host.name))
        else:
            remote = Command(words, there | {HOST: host.name})
            line = f"cd {shlex.quote(str(project_root()))} && exec {remote}"
            found.append(Command(["ssh", "-o", "BatchMode=yes", "--", host.name, line], {}, host.name))
    return found


def require_deepspeed(config: RunConfig) -> None:
    """Refuse a strategy that does not go beyond one machine. Raises `UserError`."""
    if strategy_named(config.strategy).stage is None:
        raise UserError(
            f"{config.strategy} runs on one machine: on several, use zero0 to zero3 (zero0 is DeepSpeed's ddp)"
        )


def require_nodes(config: RunConfig, nodes: int) -> None:
    """Refuse a number of SLURM nodes that cannot take the run. Raises `UserError`."""
    require_deepspeed(config)
    if nodes < 1 or config.ranks % nodes:
        raise UserError(f"{config.ranks} ranks cannot be shared out evenly over {nodes} nodes: change one of them")


def slurm_script(config: RunConfig, folder: Path, nodes: int, on_gpu: bool) -> str:
    """A SLURM batch script for the run in `folder`: one DeepSpeed launcher per node, under one supervisor on the first.

    Where the job is ended before its time, by a limit or for another job, the same script goes on from the last
    checkpoint. Raises `UserError` if the ranks cannot be shared out evenly.
    """
    require_nodes(config, nodes)
    each = config.ranks // nodes
    gpus = f"#SBATCH --gpus-per-node={each}\n" if on_gpu else ""
    hostfile, run = shlex.quote(f"{display_path(folder)}/slurm-hostfile"), shlex.quote(display_path(folder))
    return f"""#!/bin/bash
# {config.name}: {config.strategy} with {config.ranks} ranks on {nodes} nodes. sbatch starts it, scancel stops it.
#SBATCH --job-name=minisft-{config.name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
#SBATCH --output=minisft-{config.name}-%j.log
set -euo pipefail
cd {shlex.quote(str(project_root()))}
export PYTHONSAFEPATH=1
export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"
# The nodes that this job was given, with as many ranks each.
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={each}/' > {hostfile}
exec minisft train {run} --hostfile {hostfile} --launcher srun
"""


def environment_there(supervised: str) -> dict[str, str]:
    """What makes a process on another host like one here: settings that travel, this environment's programs, and, if
    `supervised`, whom to end with: no process of that host, but the supervisor that leaves its sign in the run folder.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    # Through pdsh DeepSpeed puts the current folder on PYTHONPATH; what is named here replaces that.
    own = {"PATH": path, "PYTHONPATH": processes.environment().get("PYTHONPATH", "")} | SAFE_PATH
    return travelling(os.environ) | own | ({SUPERVISOR: SUPERVISOR_ELSEWHERE, VOICE: supervised} if supervised else {})


def write_place(folder: Path, place: Place, supervised: str) -> None:
    """The files beside a run's command that DeepSpeed reads: the hostfile, and what the variables are for pdsh."""
    plain = {name: value for name, value in environment_there(supervised).items() if PLAIN.fullmatch(value)}
    variables = "".join(f"{name}={value}\n" for name, value in plain.items())
    for name, text in ((HOSTFILE, hostfile_text(place.hosts)), (ENVIRONMENT, variables)):
        with written_whole(folder / name, private=True) as stream:
            stream.write(text)


@dataclass(frozen=True)
class Part:
    """Words of a command that belong together, and what they are for."""

    words: tuple[str, ...]
    meaning: str

    def __str__(self) -> str:
        return f"{shlex.join(self.words):<36}  {self.meaning}"


def explain(command: Sequence[str]) -> list[Part]:
    """What each part of a command of `commands` is for; all of its words, in their order."""
    parts, at = [], 0
    while at < len(command):
        is_last = at == len(command) - 1
        size, meaning = (1, RUN_FOLDER) if is_last else MEANINGS[command[at]]
        if command[at] == "env":
            size += next(i for i, word in enumerate(command[at + 1 :]) if "=" not in word)
        if command[at : at + 2] == ["--hostfile", ""]:
            meaning = "empty: this machine alone, even if it has a /job/hostfile that names others"
        parts.append(Part(tuple(command[at : at + size]), meaning))
        at += size
    return parts


def first_words(text: str) -> list[str]:
    """The words of the first command in a `command.txt`; a name in it may contain a line's end."""
    lines = text.splitlines(keepends=True)
    for count in range(1, len(lines)):
        with suppress(ValueError):  # it ends inside a quotation
            return shlex.split("".join(lines[:count]))
    return shlex.split(text)


def display_path(path: Path) -> str:
    """A path as a person types it: relative to the project where it lies inside."""
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
