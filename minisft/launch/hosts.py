"""Reads the machines of a run from a hostfile in DeepSpeed's format, and checks them first.

    # one line per machine: its name or address, and the number of ranks it takes
    worker-1 slots=8
    worker-2 slots=8

If the hostfile is missing, DeepSpeed only warns and uses this machine alone; here it is an error.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_text, user_path
from minisft.system import is_here, is_loopback

MOST_BYTES = 10_000_000  # of a hostfile
LAUNCHERS = ("ssh", "pdsh", "srun", "none")
LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[0-9]{1,9})\s*(#.*)?")
# A name must not look like an option, nor contain a character that is special to a shell.
NAME = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:_-]*[A-Za-z0-9])?")
# Variables of the launching machine that the other machines need. Only these are passed on: every
# user of a machine can read its command lines, and the command is also displayed and saved.
TRAVELS = frozenset(
    {
        *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR"),
        *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
        *("LD_LIBRARY_PATH", "MINISFT_CACHE", "MINISFT_OUTPUTS", "PYTHONPATH", "TOKENIZERS_PARALLELISM"),
        *("TORCHINDUCTOR_CACHE_DIR", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR", "TORCH_HOME"),
        *("TRANSFORMERS_OFFLINE", "TRITON_CACHE_DIR"),
    }
)
# Settings of networks and threads, too many to list one by one.
FAMILIES = re.compile(r"(NCCL|TORCH_NCCL|GLOO|UCX|OMP|MKL)_[A-Z0-9_]+")
SECRET = re.compile(r"PASS|PWD|TOKEN|KEY|SECRET|CRED|AUTH")
URL_WITH_LOGIN = re.compile(r"://[^/\s]*@")


@dataclass(frozen=True)
class Host:
    """A machine and its number of ranks. Raises `UserError` for an invalid name or no slots."""

    name: str
    slots: int

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"{self.name[:80]!r} cannot be a host's name: use letters, digits, dots and dashes")
        if self.slots < 1:
            raise UserError(f"{self.name} has no slots: give at least 1, or leave the line out")

    @property
    def is_here(self) -> bool:
        return is_here(self.name)


@dataclass(frozen=True)
class Place:
    """Where a run executes: its hosts, with their ranks, and the program that starts these.

    `ssh`   one ssh connection per host; this machine needs none
    `pdsh`  DeepSpeed's own way: one pdsh for all hosts
    `srun`  one SLURM job step per host, from inside an allocation
    `none`  no program: the user or a cluster's scheduler starts each host's command on that host
    """

    hosts: tuple[Host, ...]
    launcher: str = "ssh"

    @property
    def master(self) -> str:
        """The host of rank 0, where all ranks connect."""
        return self.hosts[0].name

    @property
    def ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    def to_dict(self) -> dict[str, Any]:
        return {"launcher": self.launcher, "hosts": {host.name: host.slots for host in self.hosts}}

    @classmethod
    def of_hostfile(cls, file: Path | str, ranks: int, launcher: str = "ssh") -> Place:
        """Place `ranks` ranks on the hosts of a hostfile. Raises `UserError` if impossible."""
        return cls.of_hosts(read_hostfile(file), ranks, launcher)

    @classmethod
    def of_hosts(cls, hosts: Sequence[Host], ranks: int, launcher: str = "ssh") -> Place:
        """Place `ranks` ranks on these hosts, in order. Raises `UserError` if impossible."""
        if launcher not in LAUNCHERS:
            raise UserError(f"unknown launcher {launcher!r}: use one of {', '.join(LAUNCHERS)}")
        hosts = share_out(hosts, ranks)
        require_names(hosts)
        require_reachable(hosts)
        if launcher in ("pdsh", "srun") and shutil.which(launcher) is None:
            raise UserError(f"{launcher} is not installed here: install it, or use --launcher ssh")
        return cls(tuple(hosts), launcher)


def read_hostfile(file: Path | str) -> list[Host]:
    """Return the hosts of a hostfile, in order. Raises `UserError`, with the line, if invalid."""
    file = user_path(file)
    if file.exists() and not file.is_file():
        raise UserError(f"hostfile {file} is not a regular file: give a text file")
    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"there is no hostfile {file}: give one with a line 'name slots=N' for each machine")
    lines = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").splitlines()
    hosts: list[Host] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"hostfile {file}, line {number}"
        match = LINE.fullmatch(text)
        if match is None:
            raise UserError(
                f"{where}: {text[:80]!r} is not a host: write its name and its ranks, as in 'worker-1 slots=8'"
            )
        try:
            host = Host(match["name"], int(match["slots"]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if host.name in line_of:
            first = line_of[host.name]
            raise UserError(f"{where}: {host.name} is in line {first} already: add its slots up in one line")
        line_of[host.name] = number
        hosts.append(host)
    if not hosts:
        raise UserError(f"hostfile {file} names no host: write a line 'name slots=N' for each machine")
    return hosts


def require_names(hosts: Sequence[Host]) -> None:
    """Raise `UserError` if this machine cannot resolve a host's name."""
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"host {host.name} cannot be found ({why}): correct its name in the hostfile, or give its address"
            ) from error


def require_reachable(hosts: Sequence[Host]) -> None:
    """Raise `UserError` if other hosts would have to connect to a loopback address."""
    first = hosts[0].name
    if is_loopback(first) and not all(is_loopback(host.name) for host in hosts):
        raise UserError(f"the other hosts cannot reach {first}: give this machine's own name or address instead")


def share_out(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """Fill the hosts in order; return those used. Raises `UserError` if slots are too few."""
    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        raise UserError(f"{ranks} ranks do not fit the {slots} slots of the hosts: lower --ranks, or add hosts")
    taken = []
    for host in hosts:
        if count := min(host.slots, ranks):
            taken.append(Host(host.name, count))
            ranks -= count
    return taken


def hostfile_text(hosts: Sequence[Host]) -> str:
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every machine of a run needs; none of them holds a secret."""

    def travels(name: str) -> bool:
        value = environment[name]
        known = name in TRAVELS or (FAMILIES.fullmatch(name) and not SECRET.search(name))
        return bool(known) and "\n" not in value and not URL_WITH_LOGIN.search(value)

    return {name: environment[name] for name in sorted(environment) if travels(name)}
