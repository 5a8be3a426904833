"""The commands for runs: prepare, launch, train, compare."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minisft.cli import options as opt
from minisft.cli.options import app, complain, print_json, run_config, with_run_options
from minisft.errors import UserError
from minisft.files import written_whole
from minisft.text import note, say
from minisft.training.heartbeat import HEARTBEAT_TIMEOUT, PROGRESS_TIMEOUT

if TYPE_CHECKING:
    from minisft.launch.hosts import Place
    from minisft.run.config import RunConfig
    from minisft.run.folder import Run


@app.command()
@with_run_options
def prepare(
    options: dict[str, Any],
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    hostfile: opt.Hostfile = None,
    launcher: opt.LauncherName = None,
    slurm_nodes: Annotated[int | None, typer.Option(help="write a SLURM batch script for this number of nodes")] = None,
) -> None:
    """Prepare a run: write its folder and print the command that trains it.

    The parts of the command are explained on stderr.
    """
    from minisft.launch import prepare_run
    from minisft.launch.commands import commands, display_path, explain, first_words, require_nodes, slurm_script
    from minisft.run.folder import project_root
    from minisft.training.preflight import warn_of_cores

    config, place = _settings_and_place(options, hostfile, launcher)
    if slurm_nodes is not None:
        require_nodes(config, slurm_nodes)
    run = prepare_run.prepare(config, place=place, overwrite=overwrite, restart=restart, say=note)
    if Path.cwd() != project_root():
        note(f"Run this in the folder {project_root()}:")
    if slurm_nodes is not None:
        script = run.folder / "job.sbatch"
        with written_whole(script, private=True) as stream:
            stream.write(slurm_script(run.config, run.folder, slurm_nodes, run.on_gpu))
        if not run.on_gpu:
            note("This machine has no GPU, so the run was prepared for CPUs: prepare it on a GPU node to use GPUs")
        say(shlex.join(["sbatch", display_path(script)]))
        return
    if place is None and not run.on_gpu:
        warn_of_cores(config, note)
    # A finished run is not prepared again, and its command.txt may come from somebody else.
    lines = commands(run.config, run.folder, place, prepared=run.prepared) if run.status == "done" else None
    text = run.command if lines is None else "\n".join(map(str, lines))
    for part in explain(first_words(text)):
        note(str(part))
    say(text)


@app.command()
@with_run_options
def launch(
    options: dict[str, Any],
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    hostfile: opt.Hostfile = None,
    launcher: opt.LauncherName = None,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    progress_timeout: opt.ProgressTimeout = PROGRESS_TIMEOUT,
) -> None:
    """Prepare a run, train it, and show its progress until it ends."""
    from minisft.launch import prepare_run

    _require_timeouts(heartbeat_timeout, progress_timeout)
    config, place = _settings_and_place(options, hostfile, launcher)
    if place is not None and place.launcher == "none":
        raise UserError("--launcher none starts no ranks: use minisft prepare, which prints one command per host")
    run = prepare_run.prepare(config, place=place, overwrite=overwrite, restart=restart, say=note)
    _launch(run, place, heartbeat_timeout, progress_timeout)


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="name or folder of a run that `minisft prepare` made")],
    hostfile: opt.Hostfile = None,
    launcher: opt.LauncherName = None,
    heartbeat_timeout: opt.HeartbeatTimeout = HEARTBEAT_TIMEOUT,
    progress_timeout: opt.ProgressTimeout = PROGRESS_TIMEOUT,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Train a prepared run, or resume an unfinished one."""
    from minisft.run.folder import Run

    _require_timeouts(heartbeat_timeout, progress_timeout)
    prepared = Run.load(run, trust_remote_code)
    _launch(prepared, _place(hostfile, prepared.config.ranks, launcher), heartbeat_timeout, progress_timeout)


def _settings_and_place(
    options: dict[str, Any], hostfile: Path | None, launcher: str | None
) -> tuple[RunConfig, Place | None]:
    """The settings, and the hosts of a hostfile: one rank per slot unless `--ranks` is given."""
    from minisft.launch.hosts import read_hostfile

    if hostfile is not None:
        options.setdefault("ranks", sum(host.slots for host in read_hostfile(hostfile)))
    config = run_config(options)
    return config, _place(hostfile, config.ranks, launcher)


def _place(hostfile: Path | None, ranks: int, launcher: str | None) -> Place | None:
    from minisft.launch.hosts import Place

    if hostfile is not None:
        return Place.of_hostfile(hostfile, ranks, launcher or "ssh")
    if launcher is not None:
        raise UserError(f"--launcher {launcher} is for other machines: name them with --hostfile, or leave it out")
    return None


def _require_timeouts(heartbeat_timeout: float, progress_timeout: float) -> None:
    for what, seconds in (("--heartbeat-timeout", heartbeat_timeout), ("--progress-timeout", progress_timeout)):
        if not seconds > 0:
            raise UserError(f"{what} is {seconds:g}: give a number of seconds above 0")


def _launch(run: Run, place: Place | None, heartbeat_timeout: float, progress_timeout: float) -> None:
    from minisft.launch.launch_run import RunFailed, launch
    from minisft.training.metrics_log import TerminalProgress

    progress = TerminalProgress(sys.stdout)
    try:
        launch(run, say=progress, place=place, heartbeat_timeout=heartbeat_timeout, progress_timeout=progress_timeout)
    except (RunFailed, KeyboardInterrupt) as error:
        progress.close()
        complain(error)
        sys.exit(1)
    progress.close()
    say(f"done: {os.path.relpath(run.folder)}")


@app.command()
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="runs by name or folder; all if not given")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Compare the loss, speed, memory and communication of several runs."""
    from minisft.launch.compare_runs import comparison_table, data_difference, summary_rows, verdict
    from minisft.run.folder import Run, all_runs

    chosen = [Run.load(name) for name in runs] if runs else all_runs()
    rows = summary_rows(chosen)
    if as_json:
        print_json(rows)
        return
    say(comparison_table(rows))
    for sentence in filter(None, (verdict(chosen), data_difference(chosen))):
        say(f"\n{sentence}")
