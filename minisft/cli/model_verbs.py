"""The commands for models and machines: doctor, memory, lint, evaluate, chat, notebooks."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from minisft.cli import options as opt
from minisft.cli.options import app, complain, print_json
from minisft.errors import UserError
from minisft.text import note, say


@app.command()
def doctor(
    as_json: opt.AsJson = False,
    brief: Annotated[bool, typer.Option("--brief", help="print only failed checks and a summary")] = False,
) -> None:
    """Check what this machine can run, what is missing, and what works without it.

    Exit code 1 if something is missing that every part of the course needs.
    """
    from minisft.doctor import examine

    report = examine()
    print_json(report.to_dict()) if as_json else say(report.text(brief=brief))
    sys.exit(report.exit_code)


@app.command()
def memory(
    model: Annotated[str | None, typer.Option("--model", "-m", help="smollm2, a model folder, or a hub id")] = None,
    params: Annotated[float | None, typer.Option(help="a number of parameters instead of a model, e.g. 7e9")] = None,
    ranks: Annotated[int, typer.Option(help="number of processes, one per GPU")] = 2,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "bf16",
    batch_size: Annotated[int, typer.Option(help="rows per rank and micro-batch, for the activations")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="maximum row length, in tokens; default: 2048, or less if the model's limit is lower"),
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="recompute activations in the backward pass")
    ] = False,
    accumulation: Annotated[int, typer.Option(help="micro-batches per optimizer step")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of one GPU; shows what fits and what to use")] = None,
    states_only: Annotated[bool, typer.Option("--states-only", help="omit the activations")] = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.AsJson = False,
) -> None:
    """Predict the memory of each rank under every strategy, without allocating it."""
    from minisft.zero import memory_report

    if (model is None) == (params is None):
        raise UserError("give either --model or --params, e.g. minisft memory --model smollm2")
    batch = None if states_only else memory_report.Batch(batch_size, max_length, activation_checkpointing)
    if gpu_memory is not None and not math.isfinite(gpu_memory):
        raise UserError(f"--gpu-memory is {gpu_memory:g}: give GB, e.g. 80")
    if params is not None:
        report = memory_report.memory_of_parameters(params, ranks, precision, accumulation)
    else:
        assert model is not None  # exactly one of the two is given
        on_gpu = gpu_memory is not None
        report = memory_report.memory_of_model(
            model, ranks, precision, batch, trust_remote_code, note, accumulation, on_gpu
        )
    if gpu_memory is not None:
        report.add_plan(gpu_memory * 1e9)
    print_json(report.to_dict()) if as_json else say(report.text())


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="a DeepSpeed configuration in JSON")],
    ranks: Annotated[int | None, typer.Option(help="number of processes, to check the batch sizes")] = None,
    params: Annotated[float | None, typer.Option(help="number of model parameters, to check bucket sizes")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Find mistakes in a DeepSpeed configuration.

    The exit code is 1 if DeepSpeed would reject the configuration or not do what it says.
    """
    from minisft.zero.lint_config import lint_file

    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks is {ranks}: give at least 1")
    if params is not None and not 1 <= params < math.inf:
        raise UserError(f"--params is {params:g}: give a number from 1, e.g. 7e9")
    findings = lint_file(file, ranks=ranks, parameters=None if params is None else int(params))
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        say("\n".join(map(str, findings)) or f"no problems found in {file}")
    sys.exit(1 if any(finding.severity == "error" for finding in findings) else 0)


@app.command()
def evaluate(
    runs: Annotated[
        list[str] | None, typer.Argument(help="runs by name or folder; all runs with checkpoints if not given")
    ] = None,
    rows: Annotated[int, typer.Option(help="number of test conversations")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="maximum answer length, in tokens")] = 48,
    batch_size: Annotated[int, typer.Option(help="conversations per batch; does not change the answers")] = 32,
    answers: Annotated[str, typer.Option(help="answers to score in each conversation: last or all")] = "last",
    resamples: Annotated[int, typer.Option(help="bootstrap samples for confidence intervals; 0 for none")] = 1000,
    exclude_leaked: Annotated[
        bool, typer.Option("--exclude-leaked", help="replace test conversations whose question was also trained")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait for runs that are still training")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every file again, instead of reusing cached checksums")
    ] = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Evaluate every checkpoint and the model before training: BLEU, loss, example answers."""
    from minisft.course.figures.evaluation import draw
    from minisft.evaluation.eval_set import EvalSettings
    from minisft.evaluation.evaluate_checkpoints import evaluate_runs, runs_to_evaluate
    from minisft.run.folder import Run, all_runs

    settings = EvalSettings(rows, max_new_tokens, batch_size, answers, resamples, exclude_leaked)
    wanted = [Run.load(name, trust_remote_code) for name in runs] if runs else all_runs(trust_remote_code)
    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    chosen = runs_to_evaluate(wanted, wait, typer.confirm if is_interactive else None, say)
    if runs and not chosen:
        raise UserError(f"{wanted[0].name} is being trained: give --wait, or evaluate it when it is done")
    if not runs:
        for run in chosen:
            if not run.checkpoints:
                say(f"{run.name} is skipped: it has no checkpoint (status: {run.status})")
        chosen = [run for run in chosen if run.checkpoints]
    if not chosen:
        raise UserError(
            "no run in outputs/model has a checkpoint: train one first, e.g. ./launchers/run_zero.sh vanilla"
        )
    broken = evaluate_runs(chosen, settings, verify=verify)
    if picture := draw(chosen):
        say(f"written to {os.path.relpath(picture.parent)}: a summary of each run, and {picture.name} of all")
    if broken:
        complain(f"{len(broken)} checkpoints or runs could not be evaluated: {broken[0]}")
        sys.exit(1)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="a run with a checkpoint, by name or folder")],
    step: Annotated[int | None, typer.Option(help="step of the checkpoint; the last checkpoint if not given")] = None,
    beside: Annotated[bool, typer.Option("--beside", help="also show answers of the model before training")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="maximum answer length, in tokens")] = 200,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Talk to a trained model: each line is a question, and Ctrl-D ends the conversation."""
    from minisft.evaluation.chat_session import in_terminal, open_sessions
    from minisft.run.folder import Run

    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: give at least 1")
    in_terminal(open_sessions(Run.load(run, trust_remote_code), step, beside), sys.stdin, sys.stdout, max_new_tokens)


@app.command()
def notebooks(
    paths: Annotated[list[Path] | None, typer.Argument(help="notebook files; all of the course if not given")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="also update the outputs in the notebooks")] = False,
    timeout: Annotated[float | None, typer.Option(help="time limit for each notebook, in seconds")] = None,
    edition: Annotated[
        str | None, typer.Option(help="student, teacher or slides: write that edition instead of executing notebooks")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the edition (default: outputs/course/EDITION)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the files of the edition")] = False,
) -> None:
    """Execute notebooks, and write executed copies and an HTML book to outputs/notebooks.

    With --edition, write the notebooks to work through (student), teach from (teacher) or show (slides).
    """
    from minisft.course.editions import write_edition
    from minisft.course.notebooks import execute
    from minisft.run.folder import outputs_root, project_root

    if edition is None:
        sys.exit(execute(project_root(), paths, in_place=in_place, timeout=timeout))
    folder = out or outputs_root() / "course" / edition
    written = write_edition(project_root(), edition, folder, overwrite)
    say(f"{len(written)} notebooks of the {edition} edition: {folder}")
