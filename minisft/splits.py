"""Train and test: split by whole conversation before anything else is cut, and nothing of the test set is trained."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minisft.conversations import Conversation
from minisft.ledger import Ledger


@dataclass(frozen=True)
class Split:
    """Which conversations are for testing, by origin, and which questions the train side asks too."""

    test_origins: frozenset[str]
    train_questions: frozenset[bytes]

    def side(self, conversation: Conversation) -> str:
        """`train`, `test`, or `leaked`: on the test side by its id, but its first question is in train as well."""
        if origin(conversation.id) not in self.test_origins:
            return "train"
        return "leaked" if first_question(conversation) in self.train_questions else "test"


def assign(conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0) -> Split:
    """Decide the sides, 9:1 by default, in one pass that keeps no text.

    ShareGPT V3 comes already cut into parts (`QWJhYvA_0`, `QWJhYvA_7`, …); parts of one conversation go to the
    same side, else the test set would hold the continuation of what was trained. The order is a seeded hash of
    the conversation's id, so the same conversation lands on the same side however the file is ordered.
    """
    known = [(origin(c.id), first_question(c)) for c in conversations]
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
    return Split(frozenset(test), frozenset(question for name, question in known if name not in test))


def split(
    conversations: Iterable[Conversation], test_fraction: float = 0.1, seed: int = 0, ledger: Ledger | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Train and test as two lists; a test conversation whose first question is in train is left out and counted."""
    conversations = list(conversations)
    decided = assign(conversations, test_fraction, seed)
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


def origin(conversation_id: str) -> str:
    """The conversation that a ShareGPT part was cut from: `QWJhYvA_7` -> `QWJhYvA`; other ids stand for themselves."""
    match = re.fullmatch(r"([A-Za-z0-9]{7})_\d+(#\d+)?", conversation_id)
    return match[1] if match else conversation_id.partition("#")[0]


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
