"""Results and answers that this machine computed, in its cache folder.

A folder of results may come from somebody else. So a result in it is reused only if the cache
folder has its checksum, and answers of an interrupted evaluation are saved in the cache folder.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from minisft import checksums
from minisft.checksums import digest, remember, remembered
from minisft.errors import UserError
from minisft.evaluation.answers import Answer
from minisft.evaluation.eval_set import read_cache
from minisft.files import open_own, read_text, written_whole
from minisft.run.records import CheckpointResult

RESULTS = "results.json"  # in the cache folder: the key of each result, by its checksum
MOST_RESULTS = 500  # remembered as written by this machine
ANSWERS = "answers"  # folder in the cache folder


def cached_result(folder: Path, step: int, key: str) -> CheckpointResult | None:
    """The result in `folder`, if this machine wrote it, as it is, for the same key."""
    file = folder / f"checkpoint-{step}.json"
    result = read_cache(file, CheckpointResult)
    is_known = result is not None and result["key"] == key and remembered(RESULTS).get(digest(file)) == key
    return result if is_known else None


def is_remembered(file: Path) -> bool:
    """Whether this machine wrote a result file as it is."""
    return digest(file) in remembered(RESULTS)


def remember_result(key: str, file: Path) -> None:
    """Remember the content of a result file as computed here for `key`."""
    remember(RESULTS, digest(file), key, MOST_RESULTS)


class SavedAnswers:
    """The answers to the questions behind a result's `key`, saved one by one until all are there."""

    def __init__(self, key: str):
        self.file = Path(os.devnull)
        with suppress(UserError):  # without a cache folder nothing is saved
            self.file = checksums.memory_folder() / ANSWERS / f"{key}.jsonl"

    def read(self, questions: int) -> dict[int, Answer]:
        """Return the saved answers by question index, and drop an incomplete last line."""
        answers: dict[int, Answer] = {}
        complete_lines = ""
        with suppress(OSError, UserError):  # a cache that cannot be read, such as another user's, only costs time
            text = read_text(self.file, errors="replace") or ""
            complete_lines, newline, rest = text.rpartition("\n")
            if rest:
                with written_whole(self.file, private=True) as stream:
                    stream.write(complete_lines + newline)
        for line in complete_lines.split("\n"):
            with suppress(ValueError, TypeError):  # a damaged line: its answer is generated again
                index, text, stopped = json.loads(line)
                if 0 <= index < questions:
                    answers[index] = Answer(str(text), bool(stopped))
        return answers

    def add(self, question: int, answer: Answer) -> None:
        """Save an answer. A cache that cannot be written only costs time after an interruption."""
        with suppress(OSError, UserError):
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # answers may be personal
            handle = open_own(self.file, os.O_WRONLY | os.O_APPEND, private=True)
            with os.fdopen(handle, "a", encoding="utf-8") as stream:
                stream.write(json.dumps([question, answer.text, answer.stopped]) + "\n")

    def remove(self) -> None:
        with suppress(OSError):  # in another user's cache
            if self.file.is_file():
                self.file.unlink()
