"""Read the settings of a run from a YAML file, a preset or the `run.json` of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import parse_json, read_text
from minisft.text import one_line

PRESETS = Path(__file__).with_name("presets")
MOST_BYTES = 1_000_000  # size limit of a settings file
CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
NUMBER = re.compile(r"[-+]?[0-9]{0,30}\.?[0-9]{0,30}([eE][-+]?[0-9]{1,5})?")


def preset_names() -> list[str]:
    """The names of the presets, in alphabetical order."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def read_values(file: Path) -> dict[str, Any]:
    """The values in a YAML file, or in the `run.json` of a run, by setting.

    A value of a YAML file is text unless it is a plain number, true, false or null; `RunConfig` gives
    it the type of its setting. YAML's other notations (1:30 is ninety, 010 is eight, merged
    mappings) are not read. Raises `UserError` if there is no such file, if it is not valid, or if it
    does not hold one value for each name.
    """
    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"{one_line(file)} does not exist: give a YAML file of settings, or a run's run.json")
    return _json_values(text, file) if text.lstrip().startswith("{") else _yaml_values(text, file)


def _json_values(text: str, file: Path) -> dict[str, Any]:
    values = parse_json(text, file, pairs=lambda pairs: _once_each(pairs, file))
    if "model_folder" in values and isinstance(values.get("config"), dict):  # a run.json
        values = values["config"]
    for name, value in values.items():
        if not isinstance(value, str | int | float | None):
            raise _not_single(name, file)
    return values


def _yaml_values(text: str, file: Path) -> dict[str, Any]:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{one_line(file)} is not valid YAML ({one_line(error, 200)}): correct it") from error
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise UserError(f"{one_line(file)} does not hold settings: write a line 'name: value' for each")
    pairs = []
    for key, value in root.value:
        if not isinstance(value, yaml.ScalarNode):
            raise _not_single(key.value, file)
        pairs.append((key.value, value.value if value.style else _plain_value(value.value)))
    return _once_each(pairs, file)


def _once_each(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    """The pairs as a dictionary. Raises `UserError` if a name is there twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise UserError(f"{one_line(file)}: {one_line(name, 80)} is there twice: remove one of the two")
        values[name] = value
    return values


def _not_single(name: str, file: Path) -> UserError:
    return UserError(f"{one_line(file)}: {one_line(name, 80)} is not a single value: write 'name: value'")


def _plain_value(text: str) -> Any:
    """An unquoted value: a number, true, false, null, or else text."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if WHOLE.fullmatch(text):
        return int(text)
    try:
        return float(text) if NUMBER.fullmatch(text) else text
    except ValueError:
        return text
