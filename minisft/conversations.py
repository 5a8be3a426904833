"""Conversations: from raw rows of several shapes to clean, alternating turns.

Every row ends up in exactly one place of the `Ledger`: kept, or dropped for a counted reason.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minisft.ledger import Ledger

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHAPES = "conversations (from/value), messages (role/content) or instruction/output"
LONGEST_MESSAGE = 2_000_000  # characters: more than any context holds, less than would fill the memory
LONGEST_ID = 200  # characters


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is `system`, `user` or `assistant`; `content` is untrusted text.

    `trained` is the message's weight in the loss: only answers are ever trained, and of these all but the ones
    that a data set marks with weight 0.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """What remains after cleaning: system prompts, then user and assistant in turn, an answer last."""

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


class Unusable(ValueError):
    """Why a raw row holds no conversation; the text becomes the ledger's reason."""


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
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            number += 1
            if message.trained:
                part = Conversation(f"{conversation.id}@{number}", conversation.messages[: i + 1])
                yield only_last_answer(part)


# --- from raw rows -----------------------------------------------------------------------------------------


def clean(row: Any, where: str, ledger: Ledger) -> Conversation | None:
    """One raw row -> a conversation that alternates and ends in an answer, or None with a line in the ledger.

    Takes ShareGPT rows, messages-style rows and Alpaca rows; `where` names a row that has no id. A row may also be
    the reason, an `Unusable`, why it could not even be read.
    """
    row_id = where
    try:
        row, parsed = _parsed(row)
        row_id = _id(row, where)
        if parsed:
            ledger.repair("JSON inside a string: parsed", row_id)
        messages = _messages(row, row_id, ledger)
        messages = _mended_text(messages, row_id, ledger)
        return Conversation(row_id, tuple(_in_turn(messages, row_id, ledger)))
    except Unusable as reason:
        return ledger.drop(str(reason), row_id)


def _parsed(row: Any) -> tuple[dict[str, Any], bool]:
    """The row as an object, and whether it, or its list of turns, was JSON inside a JSON string."""
    if isinstance(row, Unusable):
        raise row
    parsed = isinstance(row, str)
    if parsed:
        row = _from_json(row)
    if not isinstance(row, dict):
        raise Unusable("row is not an object")
    for key in ("conversations", "messages"):
        if isinstance(row.get(key), str):
            row, parsed = row | {key: _from_json(row[key])}, True
    return row, parsed


def _from_json(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise Unusable("text in place of a list of turns") from None


def _id(row: dict[str, Any], where: str) -> str:
    """The row's own id, if it is a name or number as ids are; else its place in the file."""
    own = row.get("id")
    if isinstance(own, str) and 0 < len(own) <= LONGEST_ID:
        return _encodable(own)
    return str(own) if isinstance(own, int | float) and not isinstance(own, bool) else where


def _messages(row: dict[str, Any], row_id: str, ledger: Ledger) -> list[Message]:
    for key in ("conversations", "messages"):
        turns = row.get(key)
        if isinstance(turns, list):
            if not turns:
                raise Unusable("empty conversation")
            return [_message(turn) for turn in turns]
    if "instruction" in row and "output" in row:
        ledger.repair("instruction/output: converted", row_id)
        return _from_alpaca(row)
    raise Unusable("row of an unknown shape")


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("a turn without role and text")
    role = either(turn, "from", "role")
    content = either(turn, "value", "content")
    if isinstance(content, list):
        content = _from_parts(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable("a turn without role and text")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise Unusable(f"unknown role {role[:20]!r}")
    return Message(known, content, _weight(turn))


def either(turn: dict[str, Any], one: str, other: str) -> Any:
    """What stands under one of two keys; a table (Parquet) has both, and None under the one that was not meant."""
    value = turn.get(one)
    return turn.get(other) if value is None else value


def _from_parts(parts: list[Any]) -> str:
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise Unusable("a turn with parts other than text")
    return "\n\n".join(part["text"] for part in parts)


def _weight(turn: dict[str, Any]) -> bool:
    weight = either(turn, "weight", "train")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise Unusable("a weight other than 0 or 1")
    return bool(weight)


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    texts = ["" if row.get(key) is None else row[key] for key in ("system", "instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("a turn without role and text")
    system, instruction, given, output = texts
    question = "\n\n".join(text for text in (instruction, given) if text.strip())
    system_prompt = [Message("system", system)] if system else []
    return [*system_prompt, Message("user", question), Message("assistant", output)]


# --- text --------------------------------------------------------------------------------------------------


def _mended_text(messages: list[Message], row_id: str, ledger: Ledger) -> list[Message]:
    if any(len(m.content) > LONGEST_MESSAGE for m in messages):
        raise Unusable(f"a message of more than {LONGEST_MESSAGE:,} characters")
    texts = [m.content for m in messages]
    for reason, mend in _TEXT_REPAIRS:
        mended = mend(texts)
        if mended != texts:
            ledger.repair(reason, row_id)
            texts = mended
    return [replace(m, content=text) for m, text in zip(messages, texts, strict=True)]


def _without_lone_bytes(texts: list[str]) -> list[str]:
    # Reading marks each byte that is no UTF-8 with a low surrogate (Python's `surrogateescape`).
    # Python knows at once that a text is ASCII, and most are.
    return [text if text.isascii() else re.sub("[\udc80-\udcff]+", "\N{REPLACEMENT CHARACTER}", text) for text in texts]


def _with_whole_characters(texts: list[str]) -> list[str]:
    return [_encodable(text) for text in texts]


def _with_line_feeds(texts: list[str]) -> list[str]:
    return [text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text for text in texts]


def _unescaped(texts: list[str]) -> list[str]:
    """Undo HTML escaping, but only where the whole conversation was escaped.

    Escaped text has entities, no `<` or `>`, and no `&` that starts none. A conversation that merely speaks of
    `&lt;` nearly always fails that in one of its turns, and stays as it is.
    """
    joined = "\n".join(texts)
    if "&" not in joined or "<" in joined or ">" in joined or not _ESCAPED_MARKUP.search(joined):
        return texts
    if _ENTITY.sub("", joined).count("&"):
        return texts
    return [html.unescape(text) for text in texts]


_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
_ESCAPED_MARKUP = re.compile(r"&(?:lt|gt|quot|#39|#x27);")


def _encodable(text: str) -> str:
    """JSON may escape half a surrogate pair, which no tokenizer can encode: replace it by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_TEXT_REPAIRS = (
    ("invalid UTF-8: replaced", _without_lone_bytes),
    ("half a surrogate pair: replaced", _with_whole_characters),
    ("HTML-escaped text: unescaped", _unescaped),
    ("CR or CRLF line ends: made LF", _with_line_feeds),
)


# --- turns -------------------------------------------------------------------------------------------------


def _in_turn(messages: list[Message], row_id: str, ledger: Ledger) -> list[Message]:
    """User and assistant in turn, an answer last; system prompts stay where they are."""
    kept: list[Message] = []
    last = None  # where the last spoken turn is in `kept`
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
        elif last is not None and kept[last].role == message.role:
            repairs["neighbours of one role: joined"] = None
            before = kept[last]
            content = before.content + "\n\n" + message.content
            kept[last] = Message(message.role, content, before.trained and message.trained)
        else:
            last = len(kept)
            kept.append(message)
    answers = sum(m.role == "assistant" for m in kept)
    while kept and kept[-1].role != "assistant":
        if kept.pop().role == "user" and answers:
            repairs["last question has no answer: removed"] = None
    for reason in repairs:
        ledger.repair(reason, row_id)
    if not answers:
        raise Unusable("no question with an answer")
    if not any(m.trained for m in kept if m.role == "assistant"):
        raise Unusable("every answer has weight 0")
    return kept


def is_blank(text: str) -> bool:
    """Nothing to see: spaces, line ends, and such as the zero-width space, which ShareGPT has for answers."""
    return not any(c.isprintable() and not c.isspace() for c in text)
