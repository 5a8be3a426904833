"""Split conversations into train and test so that no part of a test conversation is trained.

The split is by whole conversation and comes before truncation and every other selection.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from minisft.data.conversations import Conversation
from minisft.data.ledger import Ledger
from minisft.text import one_line

FEW = 10  # parts up to which a name that is neither random nor a word counts as one conversation
NAMED = 3  # how many labels a note lists by name
_PART = re.compile(r"([A-Za-z0-9]{7})_\d+")  # ShareGPT's ids: a random name and the number of the part
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_CHANGES = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[a-z0-9])|(?<=[0-9])(?=[A-Za-z])")


@dataclass(frozen=True)
class Origins:
    """Which ids are parts of one conversation.

    `names` are conversations whose parts have the ids `<name>_<number>`. `repeated` are ids whose
    numbered copies (`<id>#2`) belong to the same conversation; the copies of `labels` are rows of
    their own.
    """

    names: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ids: Collection[str], wanted: int) -> Origins:
        """Decide from all ids of the data set. `wanted` is the number of rows for testing.

        `QWJhYvA_7` is a part of a conversation; `example_7` is an independent row, and so is
        `topic12_7` if there are many of them. A name counts as a conversation if it looks random or
        if only a few parts have it. If most names look random, a name with up to `wanted` parts
        counts as well, even if it happens to look like a word. Numbered copies are no further parts.

        Copies belong together unless most rows then belong to conversations that are too large for
        the test side, for example if every row has the same id or the name of its source. Then
        only ids with few copies are kept together.
        """
        all_ids = set(ids)
        copies = Counter(base for name in ids if (base := name.partition("#")[0]) != name and base in all_ids)
        part_ids = {base: match[1] for name in ids if (match := _PART.fullmatch(base := name.partition("#")[0]))}
        parts = Counter(part_ids.values())
        random = {name for name in parts if _looks_random(name)}
        most = wanted if 2 * len(random) > len(parts) else 0
        names = frozenset(
            name for name in parts if name in random or parts[name] <= max(most, 0 if _is_word(name) else FEW)
        )
        together = cls(names, frozenset(copies))
        sizes = Counter(map(together.origin, ids))
        if 2 * sum(size for size in sizes.values() if size > max(FEW, 1.5 * wanted)) <= len(ids):
            return together
        # The copies of several parts are all of their conversation.
        several = {base for base, name in part_ids.items() if name in names and parts[name] > 1}
        repeated = frozenset(base for base, n in copies.items() if n < max(FEW, wanted) or base in several)
        return cls(names, repeated, frozenset(copies) - repeated)

    def origin(self, conversation_id: str) -> str:
        """The name of the conversation that a row was cut from; the row's own id if it is whole."""
        base, _, copy = conversation_id.partition("#")
        name = base if not copy or base in self.repeated else conversation_id
        match = _PART.fullmatch(name)
        return match[1] if match and match[1] in self.names else name


def _looks_random(name: str) -> bool:
    """Whether a name mixes capitals, lowercase letters and digits.

    Words have at most one capital, and digits only at the end: two changes of kind at most.
    """
    return len(_CHANGES.findall(name)) > 2


def _is_word(name: str) -> bool:
    """Whether a name looks like a word: it has vowels, but no long run of vowels or consonants."""
    letters = name.lower()
    return bool(_WORD.fullmatch(name) and re.search("[aeiouy]", letters)) and not re.search(
        "[^aeiouy]{5}|[aeiouy]{4}", letters
    )


def origin(conversation_id: str) -> str:
    """The conversation that a ShareGPT part was cut from: `QWJhYvA_7` -> `QWJhYvA`.

    Other ids are returned unchanged. This function sees a single id; `assign` sees all of them and
    groups fewer.
    """
    base = conversation_id.partition("#")[0]
    match = _PART.fullmatch(base)
    return match[1] if match and not _is_word(match[1]) else base


# --- sides -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The result of `assign`: origins on the test side and first questions on the train side.

    `train_questions` are the fingerprints of `first_question`.
    """

    test_origins: frozenset[str]
    train_questions: frozenset[bytes]
    origins: Origins = Origins()

    def side(self, conversation: Conversation) -> str:
        """The side of a conversation: `train`, `test` or `leaked`.

        `leaked` is on the test side by its id, but its first question is also in train.
        """
        if self.origins.origin(conversation.id) not in self.test_origins:
            return "train"
        return "leaked" if first_question(conversation) in self.train_questions else "test"


def assign(
    conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0, ledger: Ledger | None = None
) -> Split:
    """Decide which conversations are for testing, in one pass that keeps no text.

    ShareGPT V3 is already cut into parts (`QWJhYvA_0`, `QWJhYvA_7`, …). Parts of one conversation
    go to the same side; otherwise the test set would contain the continuation of trained text.
    Conversations are ordered by a hash of their id and `seed`, so a conversation lands on the same
    side for any order of the file. `ledger` gets a note if the test side is empty or differs much
    from `test_fraction`, or if rows with the same id are on both sides.
    """
    ids_and_questions = [(c.id, first_question(c)) for c in conversations]
    origins = Origins.of([row_id for row_id, _ in ids_and_questions], round(test_fraction * len(ids_and_questions)))
    rows = [(origins.origin(row_id), question) for row_id, question in ids_and_questions]
    sizes = Counter(name for name, _ in rows)
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    # At least one row on each side, unless there is only one conversation.
    wanted = max(1, min(round(test_fraction * len(rows)), len(rows) - 1)) if len(sizes) > 1 else 0
    test: set[str] = set()
    taken = 0
    for name in order:
        if taken + sizes[name] <= wanted:
            test.add(name)
            taken += sizes[name]
    if wanted and not test:  # every conversation has more parts than the test set has rows
        test.add(min(order, key=lambda name: sizes[name]))
    decided = Split(frozenset(test), frozenset(question for name, question in rows if name not in test), origins)
    if ledger is not None:
        for note in (_size_note(decided, rows, test_fraction), _label_note(decided, rows)):
            if note:
                ledger.note(note)
    return decided


def _label_note(split: Split, rows: list[tuple[str, bytes]]) -> str:
    """A note if copies of one id are on both sides; else `""`. `rows` are pairs of origin and first question."""
    sides: dict[str, set[bool]] = {label: set() for label in sorted(split.origins.labels)}
    for name, _ in rows:
        if (base := name.partition("#")[0]) in sides:
            sides[base].add(name in split.test_origins)
    if not (parted := [one_line(label, 40) for label, found in sides.items() if len(found) > 1]):
        return ""
    shown = ", ".join(parted[:NAMED]) + (", …" if len(parted) > NAMED else "")
    return (
        f"{len(parted):,} {'id has' if len(parted) == 1 else 'ids have'} rows on both sides of the split ({shown}), "
        "because most rows share an id with too many others: give each conversation an id of its own"
    )


def _size_note(split: Split, rows: list[tuple[str, bytes]], test_fraction: float) -> str:
    """A note if the test side is empty or off by more than half of the requested size; else `""`.

    `rows` are pairs of origin and first question.
    """
    test_questions = [question for name, question in rows if name in split.test_origins]
    leaked = sum(question in split.train_questions for question in test_questions)
    test_rows = len(test_questions) - leaked
    wanted = test_fraction * len(rows)
    if not rows or (test_rows and abs(test_rows - wanted) <= max(1, wanted / 2)):
        return ""
    reasons = [f"{leaked:,} more have a first question that is in train too"] if leaked else []
    if (parts := len(rows) - len({name for name, _ in rows})) and len(test_questions) != round(wanted):
        reasons.append(f"parts of one conversation stay together (by their ids; {parts:,} rows are further parts)")
    elif len(rows) == 1:
        reasons.append("a single conversation cannot be split")
    why = "".join(f"; {reason}" for reason in reasons)
    return f"the test side has {test_rows:,} of {len(rows):,} rows instead of {test_fraction:.0%}{why}"


def split(
    conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0, ledger: Ledger | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into the lists train and test, as `assign` decides.

    A test conversation whose first question is also in train is left out and counted in `ledger`.
    """
    conversations = list(conversations)
    decided = assign(conversations, test_fraction, seed, ledger)
    sides: dict[str, list[Conversation]] = {"train": [], "test": [], "leaked": []}
    for conversation in conversations:
        side = decided.side(conversation)
        sides[side].append(conversation)
        if ledger is not None:
            count_side(side, conversation, ledger)
    return sides["train"], sides["test"]


def count_side(side: str, conversation: Conversation, ledger: Ledger) -> None:
    """Count one conversation in `ledger` on its side of the split."""
    if side == "leaked":
        ledger.drop("test: its first question is in train too", conversation.id)
    else:
        ledger.count(f"{side} side of the split", characters=conversation.characters)


def first_question(conversation: Conversation) -> bytes:
    """A 12-byte hash of the system prompt and first question, without case and white space."""
    texts = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        texts.append(" ".join(message.content.casefold().split()))
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=12).digest()


def select(
    conversations: Iterable[Conversation],
    stage: str,
    ledger: Ledger,
    max_characters: int | None,
    max_rows: int | None,
) -> Iterator[Conversation]:
    """Yield the first `max_rows` conversations of at most `max_characters` characters each.

    `ledger` counts them under `stage`, and the others as dropped. None means no limit.
    """
    rows = 0
    for conversation in conversations:
        if max_characters is not None and conversation.characters > max_characters:
            ledger.drop(f"{stage}: longer than {max_characters} characters", conversation.id)
        elif max_rows is not None and rows >= max_rows:
            ledger.drop(f"{stage}: beyond the first {max_rows} rows", conversation.id)
        else:
            rows += 1
            ledger.count(stage, characters=conversation.characters)
            yield conversation
