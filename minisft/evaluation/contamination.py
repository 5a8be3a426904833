"""Test questions that were trained: a model may answer those from memory, which says nothing about the others.

The split (`minisft.data.splits`) already keeps conversations that begin alike on one side. This looks closer, at every
prompt that is evaluated and at every row as it was trained, cut and templated, and finds near duplicates as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.evaluation.metrics import BY_CHARACTER

SHINGLE = 5  # words
FEWEST = 4  # shingles of a question: with fewer, a phrase that many use would count as a duplicate
NEAR = 0.8  # of a question's shingles, in one row
ROWS_AT_ONCE = 512

# Scripts without blanks between words count by the character; and so do signs that are no punctuation, emoji say.
_WORD = re.compile(
    rf"[{BY_CHARACTER}]|(?:(?![{BY_CHARACTER}])\w)+|[^\w\s\x00-\x7f\u00a0-\u00bf\u2010-\u2027\u3000-\u303f]"
)

Words = tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """What is evaluated: `whole`, the text of all its tokens, and the `questions` that the user asks in it."""

    whole: str
    questions: Sequence[str]


@dataclass(frozen=True)
class Overlap:
    """A prompt that was trained, in the row with this id: whether it begins with it, and the `share` of it there."""

    row: str
    exact: bool
    share: float


def find_overlaps(prompts: Mapping[str, Prompt], rows: Iterable[tuple[str, str]]) -> dict[str, Overlap]:
    """Which `prompts` (by id) are in the training `rows` (id and text); those that are not are left out.

    Texts are compared by their words alone, blind to case, punctuation and white space. `exact`: a row begins with
    the whole prompt. Near: one row holds at least 80% of the questions' runs of five words (the containment of Broder,
    1997), which is found however the rest of the row differs; a system prompt that many share does not count. Questions
    of fewer than eight words can only be exact.
    """
    runs = {name: set().union(*map(_shingles, map(words_of, p.questions))) for name, p in prompts.items()}
    runs = {name: found for name, found in runs.items() if len(found) >= FEWEST}
    holders: dict[Words, list[str]] = {}
    for name, found in runs.items():
        for run in found:
            holders.setdefault(run, []).append(name)
    whole: dict[Words, list[str]] = {}
    for name, prompt in prompts.items():
        if any(map(words_of, prompt.questions)):
            whole.setdefault(words_of(prompt.whole), []).append(name)
    lengths = {len(words) for words in whole}

    leaks: dict[str, Overlap] = {}
    for row, text in rows:
        words = words_of(text)
        shares = Counter(name for run in _shingles(words) & holders.keys() for name in holders[run])
        found = {name: (False, count / len(runs[name])) for name, count in shares.items()}
        for length in lengths:
            found |= dict.fromkeys(whole.get(words[:length], ()), (True, 1.0))
        for name, (exact, share) in found.items():
            known = leaks.get(name)
            if share >= NEAR and (known is None or (exact, share) > (known.exact, known.share)):
                leaks[name] = Overlap(row, exact, share)
    return leaks


def words_of(text: str) -> Words:
    """The words of a text, in order and in one case."""
    return tuple(_WORD.findall(text.casefold()))


def _shingles(words: Words) -> set[Words]:
    return set(zip(*(words[i:] for i in range(SHINGLE)), strict=False))


def trained_texts(rows: Any, tokenizer: Any) -> Iterable[tuple[str, str]]:
    """Of every row of `training_data.load_rows` its id and the text of its tokens, control tokens written out."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        yield from zip(part["id"], map(tokenizer.decode, part["input_ids"]), strict=True)
