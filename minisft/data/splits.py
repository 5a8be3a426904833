"""Train and test: split by whole conversation before anything else is cut, and nothing of the test set is trained."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from minisft.data.conversations import Conversation
from minisft.data.ledger import Ledger

FEW = 10  # rows that may share an origin whose name tells nothing
_PART = re.compile(r"([A-Za-z0-9]{7})_\d+")  # ShareGPT's ids: a random name, and the number of the part
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_CHANGES = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[a-z0-9])|(?<=[0-9])(?=[A-Za-z])")


@dataclass(frozen=True)
class Origins:
    """Which ids are parts of one conversation: `names` that stand before a number, and ids that were `repeated`."""

    names: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ids: Collection[str], wanted: int) -> Origins:
        """Decide by all ids of the data, of which `wanted` rows are for testing.

        `QWJhYvA_7` is a part of a conversation; `example_7` is a row of its own, and so is `topic12_7` if there are
        many. A name is taken for a conversation if it looks random, or if few rows have it. Where most names look
        random all were drawn, those that happen to look like a word as well.
        """
        known = set(ids)
        copies = Counter(base for name in ids if (base := name.partition("#")[0]) != name and base in known)
        repeated = frozenset(name for name, more in copies.items() if more < max(FEW, wanted))
        rows = Counter(match[1] for name in ids if (match := _PART.fullmatch(name.partition("#")[0])))
        random = {name for name in rows if _looks_random(name)}
        most = wanted if 2 * len(random) > len(rows) else 0
        names = (name for name in rows if name in random or rows[name] <= max(most, 0 if _is_word(name) else FEW))
        return cls(frozenset(names), repeated)

    def origin(self, conversation_id: str) -> str:
        """The conversation that a row was cut from; the row itself stands for it if it is whole."""
        base, _, copy = conversation_id.partition("#")
        name = base if not copy or base in self.repeated else conversation_id
        match = _PART.fullmatch(name)
        return match[1] if match and match[1] in self.names else name


def _looks_random(name: str) -> bool:
    """Capitals, small letters and digits in a jumble: words have at most one capital, and digits at their end."""
    return len(_CHANGES.findall(name)) > 2


def _is_word(name: str) -> bool:
    """Letters as in a word, with vowels and without long runs of consonants."""
    letters = name.lower()
    return bool(_WORD.fullmatch(name) and re.search("[aeiouy]", letters)) and not re.search(
        "[^aeiouy]{5}|[aeiouy]{4}", letters
    )


def origin(conversation_id: str) -> str:
    """The conversation that a ShareGPT part was cut from: `QWJhYvA_7` -> `QWJhYvA`; other ids stand for themselves.

    This looks at one id alone; `assign` looks at all of them, and groups fewer.
    """
    base = conversation_id.partition("#")[0]
    match = _PART.fullmatch(base)
    return match[1] if match and not _is_word(match[1]) else base


# --- sides -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which conversations are for testing, by origin, and which questions the train side asks too."""

    test_origins: frozenset[str]
    train_questions: frozenset[bytes]
    origins: Origins = Origins()

    def side(self, conversation: Conversation) -> str:
        """`train`, `test`, or `leaked`: on the test side by its id, but its first question is in train as well."""
        if self.origins.origin(conversation.id) not in self.test_origins:
            return "train"
        return "leaked" if first_question(conversation) in self.train_questions else "test"


def assign(
    conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0, ledger: Ledger | None = None
) -> Split:
    """Decide the sides, 9:1 by default, in one pass that keeps no text.

    ShareGPT V3 comes already cut into parts (`QWJhYvA_0`, `QWJhYvA_7`, …); parts of one conversation go to the
    same side, else the test set would hold the continuation of what was trained. The order is a seeded hash of
    the conversation's id, so the same conversation lands on the same side however the file is ordered. The ledger
    gets a note if the test side is empty, or far from what was asked for.
    """
    known = [(c.id, first_question(c)) for c in conversations]
    origins = Origins.of([name for name, _ in known], round(test_fraction * len(known)))
    known = [(origins.origin(name), question) for name, question in known]
    sizes = Counter(name for name, _ in known)
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    wanted = max(1, min(round(test_fraction * len(known)), len(known) - 1)) if len(sizes) > 1 else 0
    test: set[str] = set()
    taken = 0
    for name in order:
        if taken + sizes[name] <= wanted:
            test.add(name)
            taken += sizes[name]
    if wanted and not test:  # every conversation came in more parts than the test set may hold
        test.add(min(order, key=lambda name: sizes[name]))
    found = Split(frozenset(test), frozenset(question for name, question in known if name not in test), origins)
    if ledger is not None and (line := _surprise(found, known, test_fraction)):
        ledger.note(line)
    return found


def _surprise(split: Split, known: list[tuple[str, bytes]], test_fraction: float) -> str:
    """What to know of a test side that is empty, or less than half or more than twice what was asked for."""
    asked = [question for name, question in known if name in split.test_origins]
    leaked = sum(question in split.train_questions for question in asked)
    rows = len(asked) - leaked
    wanted = test_fraction * len(known)
    if not known or (rows and abs(rows - wanted) <= max(1, wanted / 2)):
        return ""
    reasons = [f"{leaked:,} more ask what is asked in train too"] if leaked else []
    if (parts := len(known) - len({name for name, _ in known})) and len(asked) != round(wanted):
        reasons.append(f"parts of one conversation stay together (by their ids; {parts:,} rows are further parts)")
    elif len(known) == 1:
        reasons.append("a single conversation cannot be split")
    why = "".join(f"; {reason}" for reason in reasons)
    return f"the test side has {rows:,} of {len(known):,} rows, where {test_fraction:.0%} was asked for{why}"


def split(
    conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0, ledger: Ledger | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Train and test as two lists; a test conversation whose first question is in train is left out and counted."""
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
    """Book one conversation on its side of the split."""
    if side == "leaked":
        ledger.drop("test: its first question is in train too", conversation.id)
    else:
        ledger.count(f"{side} side of the split", characters=conversation.characters)


def first_question(conversation: Conversation) -> bytes:
    """A fingerprint of the system prompt and first question, blind to case and white space."""
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
    """The first `max_rows` conversations of at most `max_characters`; the rest is counted in the ledger."""
    kept = 0
    for conversation in conversations:
        if max_characters is not None and conversation.characters > max_characters:
            ledger.drop(f"{stage}: longer than {max_characters} characters", conversation.id)
        elif max_rows is not None and kept >= max_rows:
            ledger.drop(f"{stage}: beyond the first {max_rows} rows", conversation.id)
        else:
            kept += 1
            ledger.count(stage, characters=conversation.characters)
            yield conversation
