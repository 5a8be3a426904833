"""The command-line application, and the options that several commands share.

The options of a run are derived from `RunConfig`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperGroup

from minisft.chat.registry import DEFAULT, TEMPLATES
from minisft.errors import UserError
from minisft.files import as_json, user_path
from minisft.run.config import SETTINGS, RunConfig, preset_values
from minisft.run.settings_file import preset_names
from minisft.text import note, one_line, say

VERBS = (  # in the order in which they are used
    *("doctor", "fetch", "encode", "show", "check", "memory", "lint"),
    *("prepare", "launch", "train", "compare", "evaluate", "chat", "notebooks"),
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=VERBS.index)


app = typer.Typer(
    cls=_InOrder,
    help="Supervised fine-tuning and ZeRO, small enough to read. Start with `minisft doctor`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a model folder, or a hub id")]

Data = Annotated[str, typer.Option("--data", "-d", help="sharegpt, a file or folder, or a hub id")]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model; only for models that you trust")
]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

MaxLength = Annotated[int, typer.Option(help="maximum row length, in tokens")]

DataArgument = Annotated[str, typer.Argument(help="sharegpt, a file or folder, or a hub id")]

TokenizerName = Annotated[
    str, typer.Option(help="smollm2, mistral:v1 (or v2, v3, v3-tekken, v7), a tokenizer folder, or a hub id")
]

Template = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(TEMPLATES)}; if not given, that of a mistral: tokenizer, else {DEFAULT}"),
]

Truncation = Annotated[str, typer.Option(help="how to shorten a row that is too long: token, turn or drop")]

TrainOn = Annotated[str, typer.Option(help="answers to train on: all, last, or each in a separate row")]

Hostfile = Annotated[Path | None, typer.Option("--hostfile", "-H", help="file with one machine per line: NAME slots=N")]

LauncherName = Annotated[
    str | None,
    typer.Option(help="how ranks start on other machines: ssh (default), pdsh, or none (you run command.txt)"),
]

HeartbeatTimeout = Annotated[
    float, typer.Option(help="seconds without a heartbeat from a rank until the run is stopped")
]

ProgressTimeout = Annotated[float, typer.Option(help="seconds without progress by any rank until the run is stopped")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing run of this name")]

Restart = Annotated[
    bool, typer.Option("--restart", help="replace an unfinished run with the same settings that cannot be resumed")
]


def with_run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each run setting to a command.

    `function` receives those that were given as the dictionary `options`; see `run_config`.
    """
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
    """One option for each setting, and two that name a preset or a file with initial settings."""
    types = get_type_hints(RunConfig)
    parameters = [_option(name, types[name]) for name in SETTINGS]
    preset_help = f"preset with the initial settings: {' or '.join(preset_names())} (default: course)"
    config_help = "file with the initial settings: a YAML file, or the run.json of a run"
    parameters.append(_parameter("preset", str, typer.Option("--preset", help=preset_help)))
    parameters.append(_parameter("config", Path, typer.Option("--config", help=config_help)))
    return parameters


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    """A keyword parameter of type `kind`; None means that its option was not given."""
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, kind: Any) -> inspect.Parameter:
    definition = SETTINGS[name]
    kind = next((part for part in get_args(kind) if part is not NoneType), kind)  # `int | None` is `int`
    dashed = name.replace("_", "-")
    flags = definition.flags or ((f"--{dashed}/--no-{dashed}",) if kind is bool else (f"--{dashed}",))
    reason = f" ({definition.reason})" if definition.reason else ""
    option = typer.Option(*flags, help=f"{definition.help}{reason} [{_default(name)}]", show_default=False)
    return _parameter(name, kind, option)


def _default(name: str) -> str:
    """The default of a setting, and the value in each preset that differs from it."""
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
    """The settings of a file or a preset, overridden by the options that were given.

    Raises `UserError` if both are given, or no strategy, or an unusable value.
    """
    preset, file = options.pop("preset", None), options.pop("config", None)
    if preset and file:
        raise UserError("--preset and --config were both given: give one of them")
    if file is not None:
        return RunConfig.from_file(file, **options)
    if "strategy" not in options:
        raise UserError("no strategy given: give --strategy, e.g. --strategy zero2 (see --help)")
    return RunConfig.from_preset(preset or "course", **options)


def local_paths(source: str) -> list[Path]:
    """The path of a local model or tokenizer; empty for one that is given by name."""
    path = user_path(source)
    return [path] if path.exists() else []


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    say(as_json(value))


def complain(reason: object) -> None:
    """Print one line on stderr."""
    note(f"minisft: {one_line(reason)}")
