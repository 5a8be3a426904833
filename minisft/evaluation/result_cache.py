"""Results that this machine computed: only those, unchanged, are used again instead of computing them."""

from __future__ import annotations

from pathlib import Path

from minisft.checksums import digest, remember, remembered
from minisft.evaluation.eval_set import (
    read_cache,
)
from minisft.run.records import CheckpointResult

RESULTS = "results.json"  # in the cache folder: the key of each result, by its checksum
MOST_RESULTS = 500  # remembered as written by this machine


def cached_result(folder: Path, step: int, key: str) -> CheckpointResult | None:
    """The result in `folder`, if this machine wrote it, as it is, for the same key."""
    file = folder / f"checkpoint-{step}.json"
    result = read_cache(file, CheckpointResult)
    is_known = result is not None and result["key"] == key and remembered(RESULTS).get(digest(file)) == key
    return result if is_known else None


def remember_result(key: str, file: Path) -> None:
    """Remember the content of a result file as computed here for `key`."""
    remember(RESULTS, digest(file), key, MOST_RESULTS)
