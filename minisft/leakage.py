"""Test questions that were trained: a model may answer those from memory, which says nothing about the others.

The split (`minisft.splits`) already keeps conversations that begin alike on one side. This looks closer, at every
prompt that is evaluated and at every row as it was trained, cut and templated, and finds near duplicates as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SHINGLE = 5  # words
NEAR = 0.8  # of a prompt's shingles, in one row
ROWS_AT_ONCE = 512

Words = tuple[str, ...]


@dataclass(frozen=True)
class Leak:
    """A prompt that was trained, in the row with this id: whether it begins with it, and the `share` of it there."""

    row: str
    exact: bool
    share: float


def find_leaks(prompts: Mapping[str, str], rows: Iterable[tuple[str, str]]) -> dict[str, Leak]:
    """Which `prompts` (texts by id) are in the training `rows` (id and text); those that are not are left out.

    Texts are compared by their words alone, blind to case, punctuation and white space. `exact`: a row begins with
    the prompt. Near: one row holds at least 80% of the prompt's runs of five words (the containment of Broder, 1997),
    which is found however the rest of the row differs. A prompt of fewer than five words can only be exact.
    """
    asked = {name: words_of(text) for name, text in prompts.items()}
    runs = {name: _shingles(words) for name, words in asked.items()}
    holders: dict[Words, list[str]] = {}
    for name, found in runs.items():
        for run in found:
            holders.setdefault(run, []).append(name)
    lengths = {len(words) for words in asked.values()}
    whole: dict[Words, list[str]] = {}
    for name, words in asked.items():
        whole.setdefault(words, []).append(name)

    leaks: dict[str, Leak] = {}
    for row, text in rows:
        words = words_of(text)
        shares = Counter(name for run in _shingles(words) & holders.keys() for name in holders[run])
        found = {name: (False, count / len(runs[name])) for name, count in shares.items()}
        for length in lengths:
            found |= dict.fromkeys(whole.get(words[:length], ()), (True, 1.0))
        for name, (exact, share) in found.items():
            known = leaks.get(name)
            if share >= NEAR and (known is None or (exact, share) > (known.exact, known.share)):
                leaks[name] = Leak(row, exact, share)
    return leaks


def words_of(text: str) -> Words:
    """The words of a text, in order and in one case."""
    return tuple(re.findall(r"\w+", text.casefold()))


def _shingles(words: Words) -> set[Words]:
    return set(zip(*(words[i:] for i in range(SHINGLE)), strict=False))


def trained_texts(rows: Any, tokenizer: Any) -> Iterable[tuple[str, str]]:
    """Of every row of `training_data.load_rows` its id and the text of its tokens."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        texts = tokenizer.hf.batch_decode(part["input_ids"], skip_special_tokens=True)
        yield from zip(part["id"], texts, strict=True)
