"""Results that this machine computed: only those, unchanged, are used again instead of computing them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from minisft import checksums
from minisft.checksums import digest
from minisft.errors import UserError
from minisft.evaluation.eval_set import (
    read_cache,
)
from minisft.files import write_json
from minisft.run.records import CheckpointResult

MOST_RESULTS = 500  # remembered as written by this machine


def cached_result(folder: Path, step: int, key: str) -> CheckpointResult | None:
    """The result in `folder`, if this machine wrote it, as it is, for the same key."""
    file = folder / f"checkpoint-{step}.json"
    result = read_cache(file, CheckpointResult)
    is_known = result is not None and result["key"] == key and _written_results().get(digest(file)) == key
    return result if is_known else None


def _written_results() -> dict[str, str]:
    """The keys of the results that this machine wrote, by checksum: a result file could be edited."""
    return read_cache(_results_memory(), dict[str, str]) or {}


def _results_memory() -> Path:
    return checksums.digest_memory().with_name("results.json")


def remember_result(key: str, file: Path) -> None:
    """Remember the content of a result file as computed here for `key`."""
    recent = dict(list(_written_results().items())[-MOST_RESULTS:])
    with suppress(OSError, UserError):  # a cache that cannot be written costs time only
        _results_memory().parent.mkdir(parents=True, exist_ok=True)
        write_json(_results_memory(), recent | {digest(file): key})
