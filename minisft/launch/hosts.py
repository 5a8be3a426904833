"""The machines of a run: a hostfile in DeepSpeed's form, read and checked before any process starts.

    # one line per machine: its name or address, and how many ranks it takes
    worker-1 slots=8
    worker-2 slots=8

DeepSpeed takes a missing hostfile for "this machine alone", and says no more than a warning; here it is an error.
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
# No host may look like an option, or be more than a name to a shell.
NAME = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:_-]*[A-Za-z0-9])?")
# Settings of the launching machine that the others need as well. Only these: a command line is public on its machine,
# and so is a command that is shown or kept.
TRAVELS = frozenset(
    {
        *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR"),
        *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
        *("LD_LIBRARY_PATH", "MINISFT_CACHE", "MINISFT_OUTPUTS", "PYTHONPATH", "TOKENIZERS_PARALLELISM"),
        *("TORCHINDUCTOR_CACHE_DIR", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR", "TORCH_HOME"),
        *("TRANSFORMERS_OFFLINE", "TRITON_CACHE_DIR"),
    }
)
# Families of switches for networks and threads, too many to list.
FAMILIES = re.compile(r"(NCCL|TORCH_NCCL|GLOO|UCX|OMP|MKL)_[A-Z0-9_]+")
SECRET = re.compile(r"PASS|PWD|TOKEN|KEY|SECRET|CRED|AUTH")
URL_WITH_LOGIN = re.compile(r"://[^/\s]*@")


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes. Raises `UserError` for what cannot be, wherever it was read from."""

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
    """Where a run takes place: its hosts, each with the ranks it takes, and what starts them there.

    `ssh`   one ssh connection for each host; a host that is this very machine needs none
    `pdsh`  DeepSpeed's own way: one pdsh for all
    `srun`  one SLURM job step for each host, from inside an allocation
    `none`  nobody: each host's command is started there, by hand or by a cluster's scheduler
    """

    hosts: tuple[Host, ...]
    launcher: str = "ssh"

    @property
    def master(self) -> str:
        """The host of rank 0, through which all find each other."""
        return self.hosts[0].name

    @property
    def ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    def to_dict(self) -> dict[str, Any]:
        return {"launcher": self.launcher, "hosts": {host.name: host.slots for host in self.hosts}}

    @classmethod
    def of_hostfile(cls, file: Path | str, ranks: int, launcher: str = "ssh") -> Place:
        """`ranks` ranks on the hosts of a hostfile, all of it checked. Raises `UserError`."""
        return cls.of_hosts(read_hostfile(file), ranks, launcher)

    @classmethod
    def of_hosts(cls, hosts: Sequence[Host], ranks: int, launcher: str = "ssh") -> Place:
        """`ranks` ranks on these hosts, filled in their order. Raises `UserError` if that cannot work."""
        if launcher not in LAUNCHERS:
            raise UserError(f"unknown launcher {launcher!r}: use one of {', '.join(LAUNCHERS)}")
        hosts = share_out(hosts, ranks)
        require_names(hosts)
        require_reachable(hosts)
        if launcher in ("pdsh", "srun") and shutil.which(launcher) is None:
            raise UserError(f"{launcher} is not installed here: install it, or use --launcher ssh")
        return cls(tuple(hosts), launcher)


def read_hostfile(file: Path | str) -> list[Host]:
    """The hosts of a hostfile, in its order. Raises `UserError`, with the line, for what DeepSpeed could not use."""
    file = user_path(file)
    if file.exists() and not file.is_file():
        raise UserError(f"hostfile {file} is not a regular file: give a text file")
    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"there is no hostfile {file}: give one with a line 'name slots=N' for each machine")
    lines = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").splitlines()
    hosts: list[Host] = []
    at: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"hostfile {file}, line {number}"
        match = LINE.fullmatch(text)
        if match is None:
            raise UserError(
                f"{where}: {text[:80]!r} is no host: write its name and its ranks, as in 'worker-1 slots=8'"
            )
        try:
            host = Host(match["name"], int(match["slots"]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if host.name in at:
            raise UserError(f"{where}: {host.name} is in line {at[host.name]} already: add its slots up in one line")
        at[host.name] = number
        hosts.append(host)
    if not hosts:
        raise UserError(f"hostfile {file} names no host: write a line 'name slots=N' for each machine")
    return hosts


def require_names(hosts: Sequence[Host]) -> None:
    """Refuse a host whose name means nothing here. Raises `UserError`."""
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except (OSError, UnicodeError) as error:  # the latter where a part of the name is empty or too long
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"host {host.name} cannot be found ({why}): correct its name in the hostfile, or give its address"
            ) from error


def require_reachable(hosts: Sequence[Host]) -> None:
    """Refuse a loopback address as the first host, where all others would look for it. Raises `UserError`."""
    first = hosts[0].name
    if is_loopback(first) and not all(is_loopback(host.name) for host in hosts):
        raise UserError(f"the other hosts cannot reach {first}: give this machine's own name or address instead")


def share_out(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """The hosts that `ranks` ranks take, filled one after the other. Raises `UserError` if there are too few slots."""
    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        raise UserError(f"{ranks} ranks were asked for, but the hosts have {slots} slots: lower --ranks, or add hosts")
    taken = []
    for host in hosts:
        if count := min(host.slots, ranks):
            taken.append(Host(host.name, count))
            ranks -= count
    return taken


def hostfile_text(hosts: Sequence[Host]) -> str:
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be the same on every machine of a run: those of a list, and none that holds a secret."""

    def travels(name: str) -> bool:
        value = environment[name]
        known = name in TRAVELS or (FAMILIES.fullmatch(name) and not SECRET.search(name))
        return bool(known) and "\n" not in value and not URL_WITH_LOGIN.search(value)

    return {name: environment[name] for name in sorted(environment) if travels(name)}
