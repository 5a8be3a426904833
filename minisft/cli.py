"""`minisft …`: a thin layer over the package. Exit code 0 is success, 1 a failed run, 2 bad usage or bad input."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from minisft.errors import UserError
from minisft.files import as_json as json_text
from minisft.files import written_whole
from minisft.processes import open_standard_streams
from minisft.text import note, one_line, say
from minisft.training.heartbeat import SILENCE, STALL

app = typer.Typer(
    help="Supervised fine-tuning and ZeRO, small enough to read. Start with: minisft doctor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a model folder, or a hub id")]
Data = Annotated[str, typer.Option("--data", "-d", help="sharegpt, a file or folder, or a hub id")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model: only for those you trust")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
MaxLength = Annotated[int, typer.Option(help="longest row, in tokens")]
DataArgument = Annotated[str, typer.Argument(help="sharegpt, a file or folder, or a hub id")]
TokenizerName = Annotated[
    str, typer.Option(help="smollm2, mistral:v1|v2|v3|v3-tekken|v7, a tokenizer's folder, or a hub id")
]
Template = Annotated[
    str | None, typer.Option(help="v1, v2, v3, v3-tekken or v7; the tokenizer's own, or v1, if not given")
]
Truncation = Annotated[str, typer.Option(help="what a row that is too long loses: token, turn or drop")]
TrainOn = Annotated[str, typer.Option(help="all answers, the last one, or each in a row of its own")]


def main() -> None:
    """Run the command line; every mistake that a user can correct ends in one sentence and exit code 2."""
    open_standard_streams()
    os.environ.pop("MPLBACKEND", None)  # figures are drawn to files; a wrong name would stop matplotlib
    warnings.showwarning = lambda message, category, *_: note(f"{category.__name__}: {one_line(message)}")
    for stream in (sys.stdout, sys.stderr):  # what the option parser prints may have characters that a locale lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _require_a_folder()
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="minisft", standalone_mode=False))
    except UserError as error:
        _stop(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        place = f" at {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "no space left on device" if error.errno != errno.EFBIG else "a file would be larger than allowed"
            _stop(f"{what}{place}: free some, or point MINISFT_CACHE and MINISFT_OUTPUTS elsewhere")
        _stop(f"{(error.strerror or str(error)).lower()}{place}: check the path, and that you may read and write there")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the option parser raises for a mistake in the call
            raise
        _stop(f"{error.format_message().rstrip('.')} (see minisft {' '.join(sys.argv[1:2])} --help)")


def _require_a_folder() -> None:
    """Paths mean something only while the folder that they start from is there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed: change to another one") from None


def _stop(reason: object) -> None:
    _complain(reason)
    sys.exit(2)


def _complain(reason: object) -> None:
    """One line to stderr."""
    note(f"minisft: {one_line(reason)}")


def _print_json(value: Any) -> None:
    say(json_text(value))


@app.command()
def doctor(
    as_json: AsJson = False,
    brief: Annotated[bool, typer.Option("--brief", help="only what is missing, and a summary")] = False,
) -> None:
    """What this machine can run, what is missing, and what works without it."""
    from minisft.doctor import examine

    report = examine()
    _print_json(report.to_dict()) if as_json else say(report.text(brief=brief))


@app.command()
def fetch(
    model: Model = "smollm2",
    data: Data = "sharegpt",
    verify: Annotated[bool, typer.Option("--verify", help="read every cached file again and compare it")] = False,
    as_json: AsJson = False,
) -> None:
    """Put model and data into the cache; says from where, how large, and under which licence.

    What is in the cache and differs from its checksum is fetched again.
    """
    from minisft.data import download

    options = {"verify": verify, "refetch": True}
    found = [download.find_model(model, note, **options), download.find_data(data, note, **options)]
    if as_json:
        _print_json([{**vars(asset), "path": str(asset.path)} for asset in found])
    else:
        for asset in found:
            say(f"{asset}\n  in {asset.path}" + (f"\n  {asset.checked}" if asset.checked else ""))


@app.command()
def encode(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="the JSON lines to write: id, input_ids, labels")],
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: MaxLength = 2048,
    truncation: Truncation = "token",
    train_on: TrainOn = "all",
    ledger: Annotated[Path | None, typer.Option(help="write what was dropped, where and why, as JSON")] = None,
) -> None:
    """Turn conversations into token ids and labels, one JSON line each."""
    from minisft.chat.mistral import MistralTemplate
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.files import require_apart, user_output, user_path
    from minisft.labels.encode_dataset import encode_stream

    book = Ledger()
    source = find_data(data, note).path
    out, ledger = user_path(out), None if ledger is None else user_path(ledger)
    require_apart([out, *([ledger] if ledger else [])], [source, *_local_paths(tokenizer)])
    using = load_tokenizer(tokenizer, template)
    form = MistralTemplate.for_tokenizer(using)
    rows = encode_stream(
        read(source, book),
        form,
        using,
        max_length=max_length,
        ledger=book,
        truncation=truncation,
        train_on=train_on,
    )
    try:
        with user_output(out) as stream:
            is_empty = True
            for row in rows:
                is_empty = False
                stream.write(json.dumps({"id": row.id, "input_ids": row.input_ids, "labels": row.labels}) + "\n")
            if is_empty:
                why = ", ".join(f"{reason} ({entry.rows})" for reason, entry in list(book.dropped.items())[:5])
                raise UserError(f"no row of {data} is left ({why}): give a larger --max-length or other data")
    finally:
        if ledger:  # it says why, also where no row was usable
            with user_output(ledger) as stream:
                stream.write(json_text(book.to_dict()) + "\n")
    note(book)


def _local_paths(source: str) -> list[Path]:
    """The path of a model or tokenizer that lies on this machine; nothing for one that is known by its name."""
    from minisft.files import user_path

    path = user_path(source)
    return [path] if path.exists() else []


@app.command()
def show(
    data: DataArgument = "sharegpt",
    row: Annotated[int, typer.Option(help="which usable conversation, from 0")] = 0,
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: MaxLength = 256,
    truncation: Truncation = "token",
) -> None:
    """The token lens: every token of one conversation with its label."""
    import itertools

    from minisft.chat.mistral import MistralTemplate
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.labels.encode_row import encode, require_truncation
    from minisft.labels.token_lens import Lens

    require_truncation(truncation)
    if max_length < 2:
        raise UserError(f"max length is {max_length}: give at least 2 tokens")
    using = load_tokenizer(tokenizer, template)
    before = list(itertools.islice(read(find_data(data, note).path, Ledger()), min(max(0, row) + 1, sys.maxsize)))
    if not 0 <= row < len(before):
        raise UserError(f"--row {row} is outside {data}, which has {len(before)} usable conversations")
    say(Lens(encode(before[row], MistralTemplate.for_tokenizer(using), using, max_length, truncation), using))


@app.command()
def check(
    data: DataArgument,
    tokenizer: TokenizerName = "smollm2",
    template: Template = None,
    max_length: Annotated[
        int | None, typer.Option(help="longest row, in tokens; 2048, or of tokenized data the longest, if not given")
    ] = None,
    truncation: Truncation = "token",
    train_on: TrainOn = "all",
    against: Annotated[
        str | None,
        typer.Option(help="the conversations that tokenized data was made of: its ids and labels must equal"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what must hold for every labelled row, on conversations or on data that is tokenized already.

    Exit code 1 and the offending rows where an invariant fails, or where a damaged file was not read to its end.
    """
    from minisft.chat.mistral import MistralTemplate
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.download import find_data
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.labels.check_dataset import check_conversations, check_tokenized
    from minisft.labels.pretokenized import Tokenized, is_tokenized

    path = find_data(data, note).path
    tokenized = is_tokenized(path)
    if against and not tokenized:
        raise UserError(f"--against goes with tokenized data, and {data} has conversations: leave it out")
    using = load_tokenizer(tokenizer, template)
    form = MistralTemplate.for_tokenizer(using)
    settings = {"truncation": truncation, "train_on": train_on, "say": note}
    book = Ledger()
    if tokenized:
        source = read(find_data(against, note).path, Ledger()) if against else None
        report = check_tokenized(Tokenized(path), form, using, max_length=max_length, against=source, **settings)
    else:
        length = 2048 if max_length is None else max_length
        report = check_conversations(read(path, book), form, using, max_length=length, **settings)
    _print_json(report.to_dict() | {"lost": book.lost}) if as_json else say(report)
    for what in book.lost:
        note(f"lost: {what}")
    sys.exit(0 if report.ok and not book.lost else 1)


def _config(
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="vanilla, ddp, zero0 to zero3, zero2-offload or zero3-offload")
    ],
    ranks: Annotated[int | None, typer.Option(help="processes; 1 for vanilla, else 2 or the number of GPUs")] = None,
    preset: Annotated[
        str, typer.Option(help="course (a minute on two cores) or full (the original settings)")
    ] = "course",
    name: Annotated[str | None, typer.Option(help="name of the run folder; the strategy if not given")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="smollm2, a model folder, or a hub id")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="sharegpt, a file or folder, or a hub id")] = None,
    max_length: Annotated[int | None, typer.Option(help="longest row, in tokens")] = None,
    template: Template = None,
    truncation: Annotated[str | None, typer.Option(help="of a row that is too long: token, turn or drop")] = None,
    train_on: Annotated[str | None, typer.Option(help="all answers, the last, or each in its own row")] = None,
    max_characters: Annotated[int | None, typer.Option(help="leave out longer conversations")] = None,
    max_rows: Annotated[int | None, typer.Option(help="train on the first so many conversations")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the training rows")] = None,
    max_steps: Annotated[int | None, typer.Option(help="stop after so many optimizer steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per rank and micro-batch")] = None,
    accumulation: Annotated[int | None, typer.Option(help="micro-batches per optimizer step")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="peak learning rate")] = None,
    warmup: Annotated[float | None, typer.Option(help="share of the steps that warm up")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="gradient clipping")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16")] = None,
    batching: Annotated[str | None, typer.Option(help="auto, padding-free, padded or packed")] = None,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option("--activation-checkpointing/--keep-activations", help="less memory for a third more work"),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="steps between checkpoints; once per epoch if not given")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="keep the last so many and the best; all if not given")
    ] = None,
    eval_rows: Annotated[
        int | None, typer.Option(help="test rows whose loss is taken at each checkpoint; 0 for none")
    ] = None,
    memory_timeline: Annotated[
        bool | None, typer.Option("--memory-timeline", help="follow every tensor of one step, for memory.json")
    ] = None,
    resumable: Annotated[
        bool | None,
        typer.Option("--resumable/--weights-only", help="save optimizer states with each checkpoint"),
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the split and of the order of rows")] = None,
) -> dict[str, Any]:
    """The options of a run, shared by `command` and `launch`; only those given are in the result."""
    return {key: value for key, value in locals().items() if value is not None}


def _run_config(options: dict[str, Any]) -> Any:
    from minisft.run.config import RunConfig

    preset = options.pop("preset")
    if preset == "course":
        return RunConfig.course(**options)
    if preset != "full":
        raise UserError(f"unknown preset {preset!r}: use course or full")
    if options["strategy"] != "vanilla":
        options.setdefault("ranks", _devices())
    return RunConfig(**options)


def _with_place(options: dict[str, Any], hostfile: Path | None, launcher: str | None) -> tuple[Any, Any]:
    """The run's settings, and its hosts if a hostfile names them: as many ranks as they have slots, if not given."""
    from minisft.launch.hosts import read_hostfile

    if hostfile is not None:
        options.setdefault("ranks", sum(host.slots for host in read_hostfile(hostfile)))
    config = _run_config(options)
    return config, _place(hostfile, config.ranks, launcher)


def _place(hostfile: Path | None, ranks: int, launcher: str | None) -> Any:
    from minisft.launch.hosts import Place

    if hostfile is not None:
        return Place.of_hostfile(hostfile, ranks, launcher or "ssh")
    if launcher is not None:
        raise UserError(f"--launcher {launcher} is about other machines: name them with --hostfile, or leave it out")
    return None


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 2


Hostfile = Annotated[Path | None, typer.Option("--hostfile", "-H", help="machines, one per line: name slots=N")]
LauncherName = Annotated[
    str | None,
    typer.Option(help="what starts the ranks on other machines: ssh (default), pdsh, or none (you, with command.txt)"),
]
Silence = Annotated[float, typer.Option(help="seconds without a sign of life after which a rank is ended, and the run")]
Stall = Annotated[float, typer.Option(help="seconds without a step of any rank after which the run is ended")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a run of this name")]
Restart = Annotated[
    bool, typer.Option("--restart", help="replace an unfinished run of these settings that cannot be resumed")
]


def _with_run_options(function: Any) -> Any:
    """Give a command the options of `_config`, plus its own."""
    import functools
    import inspect

    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
    shared = list(inspect.signature(_config, eval_str=True).parameters.values())
    names = [p.name for p in shared]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        options = _config(**{name: values.pop(name) for name in names})
        function(options=options, **values)

    command.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared + own])
    command.__annotations__ = {p.name: p.annotation for p in shared + own}
    del command.__wrapped__
    return command


@app.command()
@_with_run_options
def command(
    options: dict[str, Any],
    overwrite: Overwrite = False,
    restart: Restart = False,
    hostfile: Hostfile = None,
    launcher: LauncherName = None,
    slurm_nodes: Annotated[int | None, typer.Option(help="write a SLURM batch script for so many nodes")] = None,
) -> None:
    """Write a run folder, print the command that trains it, and say (on stderr) what each part of it is for."""
    from minisft.launch.commands import commands, display_path, explain, first_words, require_nodes, slurm_script
    from minisft.launch.prepare_run import prepare
    from minisft.run.folder import project_root
    from minisft.training.preflight import warn_of_cores

    config, place = _with_place(options, hostfile, launcher)
    if slurm_nodes is not None:
        require_nodes(config, slurm_nodes)
    run = prepare(config, place=place, overwrite=overwrite, restart=restart, say=note)
    if Path.cwd() != project_root():
        note(f"To be run in the folder {project_root()}:")
    if slurm_nodes is not None:
        script = run.folder / "job.sbatch"
        with written_whole(script, private=True) as stream:
            stream.write(slurm_script(run.config, run.folder, slurm_nodes, run.on_gpu))
        if not run.on_gpu:
            note("This machine has no GPU, so the run was prepared for CPUs: prepare it on a GPU node to use those")
        say(shlex.join(["sbatch", display_path(script)]))
        return
    if place is None and not run.on_gpu:
        warn_of_cores(config, note)
    # A finished run is returned as it is: its command.txt may be somebody else's.
    lines = commands(run.config, run.folder, place, prepared=run.prepared) if run.status == "done" else None
    text = run.command if lines is None else "\n".join(map(str, lines))
    for part in explain(first_words(text)):
        note(str(part))
    say(text)


@app.command()
@_with_run_options
def launch(
    options: dict[str, Any],
    overwrite: Overwrite = False,
    restart: Restart = False,
    hostfile: Hostfile = None,
    launcher: LauncherName = None,
    silence: Silence = SILENCE,
    stall: Stall = STALL,
) -> None:
    """Write a run folder, train it, and follow it to its end."""
    from minisft.launch.prepare_run import prepare

    _require_patience(silence, stall)
    config, place = _with_place(options, hostfile, launcher)
    if place is not None and place.launcher == "none":
        raise UserError("--launcher none leaves the start to you: minisft command prints a line for each host")
    _launch(prepare(config, place=place, overwrite=overwrite, restart=restart, say=note), place, silence, stall)


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="a run's name or folder, made by `minisft command`")],
    hostfile: Hostfile = None,
    launcher: LauncherName = None,
    silence: Silence = SILENCE,
    stall: Stall = STALL,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a prepared run."""
    from minisft.run.folder import Run

    _require_patience(silence, stall)
    prepared = Run.load(run, trust_remote_code)
    _launch(prepared, _place(hostfile, prepared.config.ranks, launcher), silence, stall)


def _require_patience(silence: float, stall: float) -> None:
    for what, seconds in (("--silence", silence), ("--stall", stall)):
        if not seconds > 0:
            raise UserError(f"{what} is {seconds:g}: give seconds, more than 0")


def _launch(run: Any, place: Any, silence: float, stall: float) -> None:
    from minisft.launch.launch_run import RunFailed, launch
    from minisft.training.metrics_log import TerminalProgress

    progress = TerminalProgress(sys.stdout)
    try:
        launch(run, say=progress, place=place, silence=silence, stall=stall)
    except (RunFailed, KeyboardInterrupt) as error:
        progress.close()
        _complain(error)
        sys.exit(1)
    progress.close()
    say(f"done: {os.path.relpath(run.folder)}")


@app.command()
def evaluate(
    runs: Annotated[
        list[str] | None, typer.Argument(help="runs by name or folder; all with checkpoints if not given")
    ] = None,
    rows: Annotated[int, typer.Option(help="test conversations to answer")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 48,
    batch_size: Annotated[int, typer.Option(help="conversations answered at once; changes no answer")] = 32,
    answers: Annotated[str, typer.Option(help="of each conversation the last answer, or all")] = "last",
    resamples: Annotated[int, typer.Option(help="bootstrap samples for the intervals; 0 for none")] = 1000,
    exclude_leaked: Annotated[
        bool, typer.Option("--exclude-leaked", help="take other conversations for those with a trained question")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait for runs that are being trained")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every file again, also those untouched since they were hashed")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """BLEU, loss and three example answers for every checkpoint, and for the model before training."""
    from minisft.course.figures.evaluation import draw
    from minisft.evaluation.eval_set import EvalSettings
    from minisft.evaluation.evaluate_checkpoints import evaluate_runs, runs_to_evaluate
    from minisft.run.folder import Run, all_runs

    settings = EvalSettings(rows, max_new_tokens, batch_size, answers, resamples, exclude_leaked)
    wanted = [Run.load(name, trust_remote_code) for name in runs] if runs else all_runs(trust_remote_code)
    is_asked = sys.stdin is not None and sys.stdin.isatty()
    chosen = runs_to_evaluate(wanted, wait, typer.confirm if is_asked else None, say)
    if runs and not chosen:
        raise UserError(f"{wanted[0].name} is being trained: give --wait, or evaluate it when it is done")
    if not runs:
        for run in chosen:
            if not run.checkpoints:
                say(f"{run.name} is left out: it has no checkpoint (it is {run.status})")
        chosen = [run for run in chosen if run.checkpoints]
    if not chosen:
        raise UserError(
            "no run in outputs/model has a checkpoint: train one first, e.g. ./launchers/run_zero.sh vanilla"
        )
    broken = evaluate_runs(chosen, settings, verify=verify)
    if picture := draw(chosen):
        say(f"written to {os.path.relpath(picture.parent)}: a summary of each run, and {picture.name} of all")
    if broken:
        _complain(f"{len(broken)} checkpoints or runs could not be evaluated: {broken[0]}")
        sys.exit(1)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="a run with a checkpoint, by name or folder")],
    step: Annotated[int | None, typer.Option(help="the checkpoint of that step; the last if not given")] = None,
    beside: Annotated[bool, typer.Option("--beside", help="let the model before training answer as well")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 200,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a trained model: each line is a question, and Ctrl-D ends the conversation."""
    from minisft.evaluation.chat_session import in_terminal, open_sessions
    from minisft.run.folder import Run

    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: give at least 1")
    in_terminal(open_sessions(Run.load(run, trust_remote_code), step, beside), sys.stdin, sys.stdout, max_new_tokens)


@app.command()
def memory(
    model: Annotated[str | None, typer.Option("--model", "-m", help="smollm2, a model folder, or a hub id")] = None,
    params: Annotated[float | None, typer.Option(help="a bare number of parameters instead, e.g. 7e9")] = None,
    ranks: Annotated[int, typer.Option(help="processes, one per GPU")] = 2,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "bf16",
    batch_size: Annotated[int, typer.Option(help="rows per rank and micro-batch, for the activations")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="longest row, in tokens; 2048 or the model's positions if not given")
    ] = None,
    activation_checkpointing: Annotated[bool, typer.Option("--activation-checkpointing")] = False,
    accumulation: Annotated[int, typer.Option(help="micro-batches per step")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of one GPU: says what fits and what to take")] = None,
    states_only: Annotated[bool, typer.Option("--states-only", help="leave the activations out")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Bytes per rank and owner under every strategy, predicted without allocating any of them."""
    from minisft.zero import memory_report

    if (model is None) == (params is None):
        raise UserError("give either --model or --params, e.g. minisft memory --model smollm2")
    batch = None if states_only else memory_report.Batch(batch_size, max_length, activation_checkpointing)
    if gpu_memory is not None and not math.isfinite(gpu_memory):
        raise UserError(f"--gpu-memory is {gpu_memory:g}: give GB, e.g. 80")
    if params is not None:
        report = memory_report.memory_of_parameters(params, ranks, precision, accumulation)
    else:
        about = (batch, trust_remote_code, note, accumulation, gpu_memory is not None)
        report = memory_report.memory_of_model(model, ranks, precision, *about)
    if gpu_memory is not None:
        report.add_plan(gpu_memory * 1e9)
    _print_json(report.to_dict()) if as_json else say(report.text())


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="a DeepSpeed configuration in JSON")],
    ranks: Annotated[int | None, typer.Option(help="processes: checks the batch arithmetic")] = None,
    params: Annotated[float | None, typer.Option(help="the model's parameters: checks the buckets")] = None,
    as_json: AsJson = False,
) -> None:
    """What is wrong with a DeepSpeed configuration; exit code 1 if DeepSpeed refuses it or does not do what it says."""
    from minisft.zero.lint_config import lint_file

    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks is {ranks}: give at least 1")
    if params is not None and not 1 <= params < math.inf:
        raise UserError(f"--params is {params:g}: give a number from 1, e.g. 7e9")
    findings = lint_file(file, ranks=ranks, parameters=None if params is None else int(params))
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        say("\n".join(map(str, findings)) or f"nothing is wrong with {file}")
    sys.exit(1 if any(finding.severity == "error" for finding in findings) else 0)


@app.command()
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="runs by name or folder; all if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Losses, speed, memory and communication of several runs, side by side, and which was best here."""
    from minisft.launch.compare_runs import comparison_table, summary_rows, verdict
    from minisft.run.folder import Run, all_runs

    chosen = [Run.load(name) for name in runs] if runs else all_runs()
    rows = summary_rows(chosen)
    if as_json:
        _print_json(rows)
        return
    say(comparison_table(rows))
    if said := verdict(chosen):
        say(f"\n{said}")


@app.command()
def notebooks(
    paths: Annotated[list[Path] | None, typer.Argument(help="notebooks; all of the course if not given")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="also refresh the committed outputs")] = False,
    timeout: Annotated[float | None, typer.Option(help="seconds for each notebook")] = None,
) -> None:
    """Execute notebooks; writes executed copies and an HTML book under outputs/notebooks."""
    from minisft.course.notebooks import execute
    from minisft.run.folder import project_root

    sys.exit(execute(project_root(), paths, in_place=in_place, timeout=timeout))


if __name__ == "__main__":
    main()
