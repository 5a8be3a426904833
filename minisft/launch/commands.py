"""Builds the command that trains a run, and explains each of its words.

A command is an argument list, never a shell string.
"""

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
from minisft.training.heartbeat import HOST, MARK, SUPERVISOR, SUPERVISOR_ELSEWHERE
from minisft.zero.strategies import strategy_named

SRUN = ["srun", "--nodes=1", "--ntasks=1", "--overlap"]
HOSTFILE, ENVIRONMENT = "hostfile", "environment"  # files in the folder of a run on several hosts
DEEPSPEED_EXPORTS = ("MLFLOW", "MV2")  # DeepSpeed copies these, logins included, to pdsh's command line
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)  # a shell leaves these characters unchanged

PER_DEVICE = "number of processes on this machine: one per GPU, where there are GPUs"
RUN_FOLDER = "the run folder: it holds everything else that the worker needs to know"
MODULE = "the next word names a Python module, not a file"
# For each word of a command: the number of words in its part, itself included, and their meaning.
MEANINGS = {
    "env": (1, "environment variables of these processes"),  # `explain` adds the assignments after it
    "python": (1, "one process, without a launcher"),
    "-m": (1, MODULE),
    "torchrun": (1, "PyTorch's launcher: starts the processes, and ends all of them when one fails"),
    "--nproc_per_node": (2, PER_DEVICE),
    "deepspeed": (1, "DeepSpeed's launcher: starts the processes, and ends all of them when one fails"),
    "--hostfile": (2, "file that lists the machines and the number of processes on each"),
    "--no_ssh": (1, "start the processes of this machine only: each of the other machines has its own command"),
    "--node_rank": (2, "index of this machine in the hostfile, counted from 0"),
    "--launcher": (2, "the program that starts the processes on the other machines"),
    "--force_multi": (1, "use that program even if the hostfile names a single machine"),
    "--master_addr": (2, "the machine of rank 0, where all ranks connect"),
    "srun": (6, "one step of this SLURM job, on that node only"),
    "ssh": (6, "starts the processes on that machine: log in by key, never ask for a password"),
    "--num_accelerators": (2, PER_DEVICE),
    "--master_port": (2, "the port where all ranks connect: a free one, so that two runs do not collide"),
    "--module": (1, MODULE),
    "minisft.training.worker": (1, "the worker, the program of every rank"),
    "-P": (1, "import no module from the current folder"),
    "--prepared": (2, "identity of the prepared run: the worker refuses the folder if it was prepared again since"),
    "--trust-remote-code": (1, "run the code that comes with the model, as you said that you trust it"),
}


@dataclass(frozen=True)
class Command:
    """A command, the environment variables it adds, and the host it is for ("" for all hosts).

    `withheld` names variables of this process that the command must not inherit.
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
    """Return the commands that start the run in `folder`: one, or one per host of `place`.

    Every call picks a free port. `supervised` is the supervisor's mark: ranks on other hosts end
    when its sign of life disappears; a run started by hand has no mark. With `prepared`, the
    `Run.identity` of the folder, the workers refuse a folder that was prepared again since.
    Raises `UserError` if pdsh would split a path.
    """
    worker = ["minisft.training.worker", *(["--prepared", prepared] if prepared else [])]
    worker += [*(["--trust-remote-code"] if config.trust_remote_code else []), display_path(folder)]
    port, ranks = str(_free_port()), str(config.ranks)
    if place is not None:
        worker_words = ["--master_addr", place.master, "--master_port", port, "--module", *worker]
        return _on_hosts(folder, place, worker_words, environment_there(supervised))
    strategy = strategy_named(config.strategy)
    if strategy.is_one_process:
        return [Command(["python", "-P", "-m", *worker])]
    if strategy.is_ddp:
        words = ["torchrun", "--nproc_per_node", ranks, "--master_port", port, "--module", *worker]
        return [Command(words, SAFE_PATH)]
    # An explicit empty hostfile keeps DeepSpeed on this machine, even if /job/hostfile exists.
    local = ["deepspeed", "--hostfile", "", "--num_accelerators", ranks]
    return [Command([*local, "--master_port", port, "--module", *worker], SAFE_PATH)]


def _on_hosts(folder: Path, place: Place, worker_words: list[str], remote_environment: dict[str, str]) -> list[Command]:
    hostfile = ["deepspeed", "--hostfile", display_path(folder / HOSTFILE)]
    if place.launcher == "pdsh":
        unsafe = [text for text in (str(folder), str(project_root()), sys.executable) if not PLAIN.fullmatch(text)]
        if unsafe:
            raise UserError(
                f"pdsh would break the path {unsafe[0]!r} apart: use a path without special characters, "
                "or --launcher ssh"
            )
        words = [*hostfile, "--launcher", "pdsh", "--force_multi", *worker_words]
        withheld = tuple(sorted(name for name in os.environ if name.startswith(DEEPSPEED_EXPORTS)))
        return [Command(words, {"DS_ENV_FILE": str(folder / ENVIRONMENT)}, withheld=withheld)]
    host_commands = []
    for k, host in enumerate(place.hosts):
        words = [*hostfile, "--no_ssh", "--node_rank", str(k), *worker_words]
        if place.launcher == "srun":  # srun passes on the environment of this process
            step = [*SRUN, "--nodelist", host.name, *words]
            host_commands.append(Command(step, SAFE_PATH | {HOST: host.name}, host.name))
        elif place.launcher == "none" or host.is_here:
            host_commands.append(Command(words, SAFE_PATH | {HOST: host.name}, host.name))
        else:
            remote = Command(words, remote_environment | {HOST: host.name})
            line = f"cd {shlex.quote(str(project_root()))} && exec {remote}"
            host_commands.append(Command(["ssh", "-o", "BatchMode=yes", "--", host.name, line], {}, host.name))
    return host_commands


def require_deepspeed(config: RunConfig) -> None:
    """Raise `UserError` if the strategy cannot run on more than one machine."""
    if strategy_named(config.strategy).stage is None:
        raise UserError(
            f"{config.strategy} runs on one machine: on several, use zero0 to zero3 (zero0 is DeepSpeed's ddp)"
        )


def require_nodes(config: RunConfig, nodes: int) -> None:
    """Raise `UserError` if the ranks cannot be divided evenly over this number of SLURM nodes."""
    require_deepspeed(config)
    if nodes < 1 or config.ranks % nodes:
        raise UserError(f"{config.ranks} ranks cannot be divided evenly over {nodes} nodes: change one of them")


def slurm_script(config: RunConfig, folder: Path, nodes: int, on_gpu: bool) -> str:
    """Return a SLURM batch script for the run in `folder`.

    It starts one DeepSpeed launcher per node, under one supervisor on the first node. If the job is
    ended early, by a time limit or by preemption, submit the same script again to resume from the
    last checkpoint. Raises `UserError` if the ranks cannot be divided evenly over the nodes.
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
# The nodes allocated to this job, with the same number of ranks on each.
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={each}/' > {hostfile}
exec minisft train {run} --hostfile {hostfile} --launcher srun
"""


def environment_there(supervised: str) -> dict[str, str]:
    """Return the environment variables of a process on another host.

    They are the settings that all hosts share, the `PATH` to this environment's programs and, if
    `supervised`, the supervisor to end with: it is not a process of that host, but leaves its sign
    of life in the run folder.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    # With pdsh, DeepSpeed puts the current folder on PYTHONPATH; the value set here replaces it.
    overrides = {"PATH": path, "PYTHONPATH": processes.environment().get("PYTHONPATH", "")} | SAFE_PATH
    variables = travelling(os.environ) | overrides
    return variables | ({SUPERVISOR: SUPERVISOR_ELSEWHERE, MARK: supervised} if supervised else {})


def write_place(folder: Path, place: Place, supervised: str) -> None:
    """Write the files that DeepSpeed reads: the hostfile, and pdsh's environment variables."""
    plain = {name: value for name, value in environment_there(supervised).items() if PLAIN.fullmatch(value)}
    variables = "".join(f"{name}={value}\n" for name, value in plain.items())
    for name, text in ((HOSTFILE, hostfile_text(place.hosts)), (ENVIRONMENT, variables)):
        with written_whole(folder / name, private=True) as stream:
            stream.write(text)


@dataclass(frozen=True)
class Part:
    """Consecutive words of a command that belong together, and what they mean."""

    words: tuple[str, ...]
    meaning: str

    def __str__(self) -> str:
        return f"{shlex.join(self.words):<36}  {self.meaning}"


def explain(command: Sequence[str]) -> list[Part]:
    """Explain a command made by `commands`: parts that together hold all of its words, in order."""
    parts, position = [], 0
    while position < len(command):
        is_last = position == len(command) - 1
        size, meaning = (1, RUN_FOLDER) if is_last else MEANINGS[command[position]]
        if command[position] == "env":
            size += next(i for i, word in enumerate(command[position + 1 :]) if "=" not in word)
        if command[position : position + 2] == ["--hostfile", ""]:
            meaning = "empty: this machine only, even if it has a /job/hostfile that names others"
        parts.append(Part(tuple(command[position : position + size]), meaning))
        position += size
    return parts


def first_words(text: str) -> list[str]:
    """Return the words of a `command.txt`'s first command; quoted names may contain newlines."""
    lines = text.splitlines(keepends=True)
    for count in range(1, len(lines)):
        with suppress(ValueError):  # these lines end inside a quotation
            return shlex.split("".join(lines[:count]))
    return shlex.split(text)


def display_path(path: Path) -> str:
    """Return a path as a person types it: relative to the project root if it is inside."""
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
