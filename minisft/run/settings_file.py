"""Read the settings of a run from a YAML file, a preset or the `run.json` of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_text
from minisft.text import one_line

PRESETS = Path(__file__).with_name("presets")
MOST_BYTES = 1_000_000  # size limit of a settings file


def preset_names() -> list[str]:
    """The names of the presets, in alphabetical order."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def read_values(file: Path) -> dict[str, Any]:
    """The values in a YAML file, or in the `run.json` of a run, by setting.

    Raises `UserError` if there is no such file, or if it does not hold one value for each name.
    """
    import yaml

    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"{one_line(file)} does not exist: give a YAML file of settings, or a run's run.json")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{one_line(file)} is not valid YAML ({one_line(error, 200)}): correct it") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):  # a run.json
        values = values["config"]
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{one_line(file)} does not hold settings: write a line 'name: value' for each")
    for name, value in values.items():
        if not isinstance(value, str | int | float | None):
            raise UserError(f"{one_line(file)}: {one_line(name, 80)} is not a single value: write 'name: value'")
    return values
