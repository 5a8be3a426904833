"""Find contamination: test questions that a model may answer from memory of its training data.

The split (`minisft.data.splits`) already keeps conversations with the same beginning on one side.
This module compares every evaluated prompt with every training row as it was trained, truncated and
in its template, and also finds near duplicates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.evaluation.metrics import BY_CHARACTER

SHINGLE = 5  # words
FEWEST = 4  # shingles of a question; with fewer, a common phrase would count as a duplicate
NEAR = 0.8  # share of a question's shingles that one row must contain
ROWS_AT_ONCE = 512

# A word is a character of a script without spaces, a run of other letters and digits, or a symbol
# that is not punctuation, such as an emoji.
_WORD = re.compile(
    rf"[{BY_CHARACTER}]|(?:(?![{BY_CHARACTER}])\w)+|[^\w\s\x00-\x7f\u00a0-\u00bf\u2010-\u2027\u3000-\u303f]"
)

Words = tuple[str, ...]


@dataclass(frozen=True)
class Beginning:
    """How a training row with a prompt begins.

    First the template writes `head` words, whatever they are: they may name the date or the number
    of messages. Then come the `words` from the first message to the answer.
    """

    head: int
    words: Words


@dataclass(frozen=True)
class Prompt:
    """One evaluated prompt: how a row that contains it may begin, and the user's messages in it."""

    beginnings: Sequence[Beginning]
    questions: Sequence[str]


@dataclass(frozen=True)
class Overlap:
    """A prompt found in the training row with id `row`.

    `exact` if the row's conversation begins with that of the prompt; `share` is the share of the
    prompt's shingles in the row, 0 to 1.
    """

    row: str
    exact: bool
    share: float


def find_overlaps(prompts: Mapping[str, Prompt], rows: Iterable[tuple[str, str]]) -> dict[str, Overlap]:
    """Return the `prompts` (by id) that occur in training `rows` (id, text), with the closest row.

    Only words are compared; case, punctuation and white space are ignored. Exact: behind the words
    that the template writes first, a row begins with the whole prompt. Near: one row contains at
    least 80% of the questions' shingles, that is sequences of five words (containment, Broder
    1997), however different the rest of the row is. System prompts are ignored, because many rows
    share them. Questions of fewer than eight words can only be exact.
    """
    shingles = {name: set().union(*map(_shingles, map(words_of, p.questions))) for name, p in prompts.items()}
    shingles = {name: own for name, own in shingles.items() if len(own) >= FEWEST}
    prompts_with: dict[Words, list[str]] = {}  # shingle -> prompts
    for name, own in shingles.items():
        for shingle in own:
            prompts_with.setdefault(shingle, []).append(name)
    prompts_of: dict[Beginning, list[str]] = {}
    for name, prompt in prompts.items():
        for beginning in set(prompt.beginnings) if any(map(words_of, prompt.questions)) else ():
            prompts_of.setdefault(beginning, []).append(name)
    spans = {(beginning.head, beginning.head + len(beginning.words)) for beginning in prompts_of}

    overlaps: dict[str, Overlap] = {}
    for row_id, text in rows:
        words = words_of(text)
        counts = Counter(name for shingle in _shingles(words) & prompts_with.keys() for name in prompts_with[shingle])
        matches = {name: (False, count / len(shingles[name])) for name, count in counts.items()}
        for start, end in spans:
            matches |= dict.fromkeys(prompts_of.get(Beginning(start, words[start:end]), ()), (True, 1.0))
        for name, (exact, share) in matches.items():
            best = overlaps.get(name)
            if share >= NEAR and (best is None or (exact, share) > (best.exact, best.share)):
                overlaps[name] = Overlap(row_id, exact, share)
    return overlaps


def words_of(text: str) -> Words:
    """Return the words of a text in order, case-folded."""
    return tuple(_WORD.findall(text.casefold()))


def _shingles(words: Words) -> set[Words]:
    return set(zip(*(words[i:] for i in range(SHINGLE)), strict=False))


def trained_texts(rows: Any, tokenizer: Any) -> Iterable[tuple[str, str]]:
    """Yield (id, decoded text with control tokens) of every row of `training.dataset.load_rows`."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        yield from zip(batch["id"], map(tokenizer.decode, batch["input_ids"]), strict=True)
