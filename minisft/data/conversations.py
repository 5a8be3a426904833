"""Conversations: from raw rows of several shapes to clean, alternating turns.

Every row ends up in exactly one place of the `Ledger`: kept, or dropped for a counted reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minisft.data.html_escapes import is_escaped, unescaped
from minisft.data.ledger import Ledger
from minisft.data.messages import IS_JSON, Message, UnusableRow, encodable
from minisft.data.row_formats import as_object, own_id, read_row

LONGEST_MESSAGE = 2_000_000  # characters: more than any context holds, less than would fill the memory


@dataclass(frozen=True, slots=True)
class Conversation:
    """What remains after cleaning: system prompts, then user and assistant in turn, an answer last.

    Two answers in a row differ in their weight: one of them is trained and the other is not.
    """

    id: str
    messages: tuple[Message, ...]

    @property
    def characters(self) -> int:
        return sum(len(m.content) for m in self.messages)

    @property
    def answers(self) -> int:
        return sum(m.role == "assistant" for m in self.messages)

    def to_sharegpt(self) -> dict[str, Any]:
        """The row in ShareGPT's own shape, for writing it back to a file."""
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [
            {"from": names[m.role], "value": m.content} | ({} if m.trained else {"weight": 0}) for m in self.messages
        ]
        return {"id": self.id, "conversations": turns}


def only_last_answer(conversation: Conversation) -> Conversation:
    """The same conversation with its last answer trained and the others not."""
    last = max(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    messages = tuple(
        replace(m, trained=m.trained and i == last) if m.role == "assistant" else m
        for i, m in enumerate(conversation.messages)
    )
    return Conversation(conversation.id, messages)


def one_per_answer(conversation: Conversation) -> Iterator[Conversation]:
    """One conversation per trained answer: all that comes before it, and that answer alone trained.

    This is what inference sees at each turn, even where the template moves the system prompt (v2, v3).
    """
    number = 0
    before: list[Message] = []
    for message in conversation.messages:
        if message.role == "assistant":
            number += 1
            if message.trained:
                yield Conversation(f"{conversation.id}@{number}", (*before, message))
            message = replace(message, trained=False)
        before.append(message)


# --- from raw rows -----------------------------------------------------------------------------------------


def clean(row: Any, where: str, ledger: Ledger, escaped: bool | None = None) -> Conversation | None:
    """One raw row -> a conversation that alternates and ends in an answer, or None with a line in the ledger.

    Takes rows of every shape that `shapes` knows; `where` names a row that has no id. A row may also be the reason,
    an `UnusableRow`, why it could not even be read. `escaped` says whether its file was HTML-escaped (`escaping`); None
    judges the row alone.
    """
    row_id = where
    try:
        row, was_text = as_object(row)
        row_id = own_id(row) or where
        if was_text:
            ledger.repair(IS_JSON, row_id)
        found = read_row(row)
        for reason in found.repairs:
            if not (was_text and reason == IS_JSON):
                ledger.repair(reason, row_id)
        messages = _mended_text(found.messages, row_id, ledger, escaped)
        conversation = Conversation(row_id, tuple(_in_turn(messages, row_id, ledger)))
    except UnusableRow as reason:
        return ledger.drop(str(reason), row_id)
    for name in found.unread:
        ledger.leave_unread(name, row_id)
    return conversation


# --- text --------------------------------------------------------------------------------------------------


def _mended_text(messages: list[Message], row_id: str, ledger: Ledger, escaped: bool | None) -> list[Message]:
    _require_length(messages)
    texts = before = [m.content for m in messages]
    for reason, mend in _TEXT_REPAIRS:
        if mend is unescaped and not (is_escaped(texts, turns=1, kinds=1) if escaped is None else escaped):
            continue
        mended = mend(texts)
        if mended != texts:
            ledger.repair(reason, row_id)
            texts = mended
    if texts is before:
        return messages
    return [replace(m, content=text) for m, text in zip(messages, texts, strict=True)]


def _without_lone_bytes(texts: list[str]) -> list[str]:
    # Reading marks each byte that is no UTF-8 with a low surrogate (Python's `surrogateescape`).
    # Python knows at once that a text is ASCII, and most are.
    return [text if text.isascii() else re.sub("[\udc80-\udcff]+", "\N{REPLACEMENT CHARACTER}", text) for text in texts]


def _with_whole_characters(texts: list[str]) -> list[str]:
    return [encodable(text) for text in texts]


def _with_line_feeds(texts: list[str]) -> list[str]:
    return [text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text for text in texts]


_TEXT_REPAIRS = (
    ("invalid UTF-8: replaced", _without_lone_bytes),
    ("half a surrogate pair: replaced", _with_whole_characters),
    ("HTML-escaped text: unescaped", unescaped),
    ("CR or CRLF line ends: made LF", _with_line_feeds),
)


# --- turns -------------------------------------------------------------------------------------------------


def _in_turn(messages: list[Message], row_id: str, ledger: Ledger) -> list[Message]:
    """User and assistant in turn, an answer last; system prompts stay where they are.

    Neighbours of one role are joined, but answers of different weight stay apart, as in Mistral's own normalization.
    """
    kept: list[Message] = []
    last = None  # where the last spoken turn is in `kept`
    joined: dict[int, list[str]] = {}  # the texts of a turn that was several; put together at the end, in linear time
    repairs: dict[str, None] = {}  # an ordered set: one line per row and reason
    for message in messages:
        if message.role == "system":
            if not is_blank(message.content):
                kept.append(message)
        elif last is None and message.role == "assistant":
            repairs["answer before any question: removed"] = None
        elif is_blank(message.content):
            repairs["empty turn: cut there"] = None
            break
        elif last is not None and _is_continued(kept[last], message):
            repairs["neighbours of one role: joined"] = None
            joined.setdefault(last, [kept[last].content]).append(message.content)
        else:
            last = len(kept)
            kept.append(message)
    for i, texts in joined.items():
        kept[i] = replace(kept[i], content="\n\n".join(texts))
    answers = sum(m.role == "assistant" for m in kept)
    while kept and kept[-1].role != "assistant":
        if kept.pop().role == "user" and answers:
            repairs["last question has no answer: removed"] = None
    for reason in repairs:
        ledger.repair(reason, row_id)
    if not answers:
        raise UnusableRow("no question with an answer")
    if not any(m.trained for m in kept if m.role == "assistant"):
        raise UnusableRow("every answer has weight 0")
    _require_length(kept)
    return kept


def _require_length(messages: list[Message]) -> None:
    if any(len(m.content) > LONGEST_MESSAGE for m in messages):
        raise UnusableRow(f"a message of more than {LONGEST_MESSAGE:,} characters")


def _is_continued(before: Message, message: Message) -> bool:
    return before.role == message.role and (message.role == "user" or before.trained == message.trained)


def is_blank(text: str) -> bool:
    """Nothing to see: spaces, line ends, and such as the zero-width space, which ShareGPT has for answers."""
    return not any(c.isprintable() and not c.isspace() for c in text)
