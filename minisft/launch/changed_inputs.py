"""Which input of an existing run has changed since it was prepared: its start model or its data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minisft.checksums import Digests
from minisft.data import download
from minisft.errors import UserError
from minisft.run.folder import Run
from minisft.training.dataset import describe_rows, made_from, model_files


def changed_inputs(run: Run) -> str:
    """Say which input of a run has changed, or "".

    Inputs that are gone are not compared: the run has its own copy of the rows.
    """
    digests = Digests()
    model = _present(download.find_model, run.config.model)
    source = _present(download.find_data, run.config.data)
    # `OSError` is for a folder that cannot be read.
    with suppress(UserError, OSError):
        if model and run.model_files and model_files(model, digests) != run.model_files:
            return f"the model {model} has changed"
    with suppress(UserError, OSError):
        if source and not made_from(run, describe_rows(run.config, source, model, digests)):
            return f"the data {source} has changed"
    return ""


def _present(find: Callable[..., download.Asset], name: str) -> Path | None:
    """The path of an input; None if it is gone."""
    with suppress(UserError, OSError):
        return find(name, _not_here).path
    return None


def _not_here(remark: str) -> None:
    """Raise `UserError` where `download` would fetch an input or replace it by a stand-in."""
    raise UserError(remark)
