"""Which input of an existing run has changed since it was prepared: its start model or its data."""

from __future__ import annotations

from contextlib import suppress

from minisft.checksums import Digests
from minisft.data import download
from minisft.errors import UserError
from minisft.run.folder import Run
from minisft.training.dataset import describe_rows, made_from, model_files


def changed_inputs(run: Run) -> str:
    """Say which input of a run has changed, or "".

    Inputs that are gone are not compared: the run has its own copy of the rows.
    """
    # `OSError` is for a folder that cannot be read.
    with suppress(UserError, OSError):
        model = download.find_model(run.config.model, _not_here).path
        source = download.find_data(run.config.data, _not_here).path
        if run.model_files and model_files(model, Digests()) != run.model_files:
            return f"the model {model} has changed"
        if not made_from(run.folder, describe_rows(run.config, source, model, Digests())):
            return f"the data {source} has changed"
    return ""


def _not_here(remark: str) -> None:
    """Raise `UserError` where `download` would fetch an input or replace it by a stand-in."""
    raise UserError(remark)
