"""The command-line application, and the options that several verbs share. Those of a run come from `RunConfig`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from minisft.errors import UserError
from minisft.files import as_json, user_path
from minisft.run.config import SETTINGS, RunConfig, preset_names, preset_values
from minisft.text import note, one_line, say

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

Hostfile = Annotated[Path | None, typer.Option("--hostfile", "-H", help="machines, one per line: name slots=N")]

LauncherName = Annotated[
    str | None,
    typer.Option(help="what starts the ranks on other machines: ssh (default), pdsh, or none (you, with command.txt)"),
]

HeartbeatTimeout = Annotated[
    float, typer.Option(help="seconds without a sign of life after which a rank is ended, and the run")
]

ProgressTimeout = Annotated[
    float, typer.Option(help="seconds without progress of any rank after which the run is ended")
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a run of this name")]

Restart = Annotated[
    bool, typer.Option("--restart", help="replace an unfinished run of these settings that cannot be resumed")
]


def with_run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of a run, beside its own: `function` gets its settings as `settings`, a `RunConfig`."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
    shared = _run_options()
    names = [parameter.name for parameter in shared]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        function(options={name: value for name, value in given.items() if value is not None}, **values)

    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared + own])
    vars(command)["__signature__"] = signature
    command.__annotations__ = {p.name: p.annotation for p in shared + own}
    del vars(command)["__wrapped__"]
    return command


def _run_options() -> list[inspect.Parameter]:
    """One option for each setting, and the two that name a file or a preset to start from."""
    types = get_type_hints(RunConfig)
    parameters = [_option(name, types[name]) for name in SETTINGS]
    for name, kind, help in (
        ("preset", str, f"settings to start from: {' or '.join(preset_names())}; course if neither is given"),
        ("config", Path, "a YAML file of settings to start from, or the run.json of a run"),
    ):
        annotation = Annotated[kind | None, typer.Option(f"--{name}", help=help)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _option(name: str, kind: Any) -> inspect.Parameter:
    about = SETTINGS[name]
    kind = next((part for part in get_args(kind) if part is not NoneType), kind)
    dashed = name.replace("_", "-")
    flags = about.flags or ((f"--{dashed}/--no-{dashed}",) if kind is bool else (f"--{dashed}",))
    reason = f" ({about.reason})" if about.reason else ""
    option = typer.Option(*flags, help=f"{about.help}{reason} [{_default(name)}]", show_default=False)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default(name: str) -> str:
    """The default of a setting, and what each preset has instead."""
    default = next(f.default for f in fields(RunConfig) if f.name == name)
    values = [f"default: {_shown(default)}"]
    for preset in preset_names():
        value = preset_values(preset).get(name, default)
        if value != default:
            values.append(f"{preset}: {_shown(value)}")
    return "; ".join(values)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value or "not set") if value != 0 else "0"


def run_config(options: dict[str, Any]) -> RunConfig:
    """The settings that a command line asks for: those of a file or a preset, and the options that were given."""
    preset, file = options.pop("preset", None), options.pop("config", None)
    if preset and file:
        raise UserError("--preset and --config were both given: give one of them")
    if file is not None:
        return RunConfig.from_file(file, **options)
    if "strategy" not in options:
        raise UserError("no strategy given: give --strategy, e.g. --strategy zero2 (see --help)")
    return RunConfig.from_preset(preset or "course", **options)


def local_paths(source: str) -> list[Path]:
    """The path of a model or tokenizer that lies on this machine; empty for one that is known by its name."""
    path = user_path(source)
    return [path] if path.exists() else []


def print_json(value: Any) -> None:
    say(as_json(value))


def complain(reason: object) -> None:
    """One line on stderr."""
    note(f"minisft: {one_line(reason)}")
