"""The command that trains a run: an argument list, never a shell string, and what each of its words is for."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.runs import RunConfig, project_root

PER_DEVICE = "processes on this machine: where it has GPUs, each takes one"
MODULE = "what follows is a module of a package, not a file"
MEANINGS = {  # a word of a command: how many words belong to it, itself included, and what they are for
    "python": (1, "one process, without a launcher"),
    "-m": (1, MODULE),
    "torchrun": (1, "PyTorch's launcher: starts the processes, and ends them all when one fails"),
    "--nproc_per_node": (2, PER_DEVICE),
    "deepspeed": (1, "DeepSpeed's launcher: starts the processes, and ends them all when one fails"),
    "--hostfile": (2, "empty: this machine alone, even if it has an /job/hostfile that names others"),
    "--num_accelerators": (2, PER_DEVICE),
    "--master_port": (2, "where they find each other; it was free just now, so that two runs never meet"),
    "--module": (1, MODULE),
    "minisft.train": (2, "the worker; everything else it needs to know is in the run folder"),
}


def command_line(config: RunConfig, folder: Path) -> list[str]:
    """The command that trains the run in `folder`, as an argument list. Every start gets a free port."""
    worker = ["minisft.train", shown(folder)]
    port, ranks = str(_free_port()), str(config.ranks)
    if config.strategy == "vanilla":
        return ["python", "-m", *worker]
    if config.strategy == "ddp":
        return ["torchrun", "--nproc_per_node", ranks, "--master_port", port, "--module", *worker]
    # An explicit empty hostfile keeps DeepSpeed on this machine, whatever /job/hostfile may hold.
    return [
        *("deepspeed", "--hostfile", "", "--num_accelerators", ranks, "--master_port", port),
        *("--module", *worker),
    ]


@dataclass(frozen=True)
class Part:
    """Words of a command that belong together, and what they are for."""

    words: tuple[str, ...]
    meaning: str

    def __str__(self) -> str:
        return f"{shlex.join(self.words):<36}  {self.meaning}"


def explain(command: Sequence[str]) -> list[Part]:
    """What each part of a command of `command_line` is for; all of its words, in their order."""
    parts, at = [], 0
    while at < len(command):
        size, meaning = MEANINGS[command[at]]
        parts.append(Part(tuple(command[at : at + size]), meaning))
        at += size
    return parts


def shown(path: Path) -> str:
    """A path as a person types it: relative to the project where it lies inside."""
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
