"""Messages, and the keys of rows and turns that they are made of.

This module alone knows which keys of a row, of a turn and of a part of a turn are read; `shapes` makes messages of
whole rows. A key that changes what a row means is honoured, or the row is dropped for a counted reason; every other key
that has a value is counted by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisft.text import one_line

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",  # Gemma and Gemini
    "system": "system",
    "developer": "system",  # OpenAI's later name
}
LONGEST_ID = 200  # characters
LONGEST_KEY = 60  # characters of a key that is counted

# Of several keys for one thing, the first that has a value is read.
TURNS = ("conversations", "messages", "conversation")
QUESTION = ("instruction", "question", "prompt", "query")
GIVEN = ("input", "context")  # what an instruction is about
ANSWER = ("output", "response", "completion", "answer")
CHOSEN = ("chosen",)  # the preferred answer, beside `rejected`
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)  # earlier turns, as pairs of question and answer
ROLE, TEXT = ("from", "role"), ("value", "content")
WEIGHT = ("weight", "train")
TRAINED = ("loss", "training")  # the same as a weight, where the value is true or false
DESIRABLE = ("label", "kto_tag", "desirable")  # true, or false for an answer that nobody should learn

IS_JSON = "JSON inside a string: parsed"  # a repair
DROPPED = {  # a row that has one of these keys, in itself, in a turn or in a part of one -> why it is dropped
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "input_image"), "needs images"),
    **dict.fromkeys(("video", "videos", "video_url"), "needs videos"),
    **dict.fromkeys(("audio", "audios", "audio_url", "input_audio"), "needs audio"),
    **dict.fromkeys(
        ("tool_calls", "function_call", "tool_use", "tool_result"), "tool calls that the template cannot show"
    ),
    **dict.fromkeys(("tools", "functions"), "tools that the template cannot show"),
    "documents": "documents that the template cannot show",
    **dict.fromkeys(("train_detail", "training_detail"), "weights for parts of an answer"),
}
LEFT_OUT = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning left out: no template has it")
KEYS = frozenset(
    ("id", *TURNS, *QUESTION, *GIVEN, *ANSWER, *CHOSEN, *SYSTEM, *HISTORY, *WEIGHT, *TRAINED, *DESIRABLE)
) | frozenset((*DROPPED, *LEFT_OUT))  # whatever is read of a row; a table's other columns need not be


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is `system`, `user` or `assistant`; `content` is untrusted text.

    `trained` is the message's weight in the loss: only answers are ever trained, and of these all but the ones
    that a data set marks with weight 0.
    """

    role: str
    content: str
    trained: bool = True


class UnusableRow(ValueError):
    """Why a raw row holds no conversation; the text becomes the ledger's reason."""


@dataclass
class ReadRow:
    """The messages of a row; what was repaired to get them, and the keys that were not read. Both are ordered sets."""

    messages: list[Message] = field(default_factory=list)
    repairs: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)


def encodable(text: str) -> str:
    """JSON may escape half a surrogate pair, which no tokenizer can encode: replace it by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# --- keys --------------------------------------------------------------------------------------------------


class Keys:
    """The keys of a row, a turn or a part; it knows which of them were read."""

    __slots__ = ("_read", "row")

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self._read: set[str] = set()

    def look(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of these keys that has a value, else the first that is there, and its value; or `("", None)`."""
        there = [name for name in names if self.row.get(name) is not None]
        name = next((name for name in there if not is_empty(self.row[name])), there[0] if there else "")
        return name, self.row.get(name)

    def take(self, names: Sequence[str]) -> Any:
        """The value that `look` finds, which is read with this; so is the same text under another of the keys."""
        name, value = self.look(names)
        self._read.add(name)
        if isinstance(value, str):
            self._read.update(key for key in names if self.row.get(key) == value)
        return value

    def unread(self) -> Iterator[str]:
        """The names of all other keys that have a value, fit to be shown."""
        for key, value in self.row.items():
            if key not in self._read and not is_empty(value):
                yield one_line(str(key)[: 2 * LONGEST_KEY], LONGEST_KEY) or "''"


def is_empty(value: Any, depth: int = 4) -> bool:
    """Whether there is nothing in a value: null, `""`, `[]`, or a table's struct of nothing else."""
    if value is None or value == "":
        return True
    if depth and isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return all(is_empty(one, depth - 1) for one in inner)
    return False


def require_supported_keys(keys: Keys, found: ReadRow) -> None:
    """Drop the row for a key that no text can stand for; note what is left out of it."""
    for key, value in keys.row.items():
        if key in DROPPED:
            if not _says_none(keys.take((key,))):
                raise UnusableRow(DROPPED[key])
        elif key in LEFT_OUT and isinstance(value, str | list | dict) and not is_empty(value):
            found.repairs[LEFT_OUT[key]] = None


def _says_none(value: Any) -> bool:
    """Nothing, false, or the JSON of nothing, as some tools write it."""
    return not value or is_empty(value) or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def weight(keys: Keys, names: Sequence[str], is_answer: bool = True) -> bool:
    """Whether something is trained; weight 1 of what is never trained is not honoured, and stays unread."""
    trained = True
    for name in names:
        value = keys.row.get(name)
        if value is None or (name in TRAINED and not isinstance(value, bool)):
            continue
        if value not in (0, 1):
            raise UnusableRow("a weight other than 0 or 1")
        trained = trained and bool(value)
        if is_answer or not value:
            keys.take((name,))
    return trained


# --- turns -------------------------------------------------------------------------------------------------


def messages_of(value: Any, role: str, found: ReadRow) -> list[Message]:
    """A text of this role, or one turn, or a list of turns."""
    if isinstance(value, list | dict):
        return [message_of(turn, found) for turn in (value if isinstance(value, list) else [value])]
    return [Message(role, text_of(value, role, found))]


def message_of(turn: Any, found: ReadRow) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow("a turn without role and text")
    if len(turn) == 2:  # nearly every turn has a role and a text, and nothing else to look for
        role, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
        if isinstance(role, str) and isinstance(content, str) and role in ROLES:
            return Message(ROLES[role], content)
    keys = Keys(turn)
    require_supported_keys(keys, found)
    role = keys.take(ROLE)
    if not isinstance(role, str):
        raise UnusableRow("a turn without role and text")
    known = ROLES.get(role.strip().lower())
    content = keys.take(TEXT)
    is_null = content is None and not turn.keys().isdisjoint(TEXT)
    content = "" if is_null else text_of(content, known, found)
    if known is None:
        raise UnusableRow(f"unknown role {role[:20]!r}")
    trained = weight(keys, (*WEIGHT, *TRAINED), known == "assistant")
    found.unread |= {f"{name} (of a turn)": None for name in keys.unread()}
    return Message(known, content, trained)


def text_of(content: Any, role: str | None, found: ReadRow) -> str:
    """The text of a turn: its parts joined, or an answer that is a bare number or true or false, as JSON writes it."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return _from_parts(content, found)
    text = as_text(content) if role == "assistant" else None
    if text is None:
        raise UnusableRow("a turn without role and text")
    found.repairs["number as an answer: made text"] = None
    return text


def as_text(value: Any) -> str | None:
    """A number, true or false as JSON; None for what is none, not finite, or too long to mean anything."""
    if not isinstance(value, int | float) or not abs(value) < 10**LONGEST_ID:  # which NaN is not, either
        return None
    return json.dumps(value)


def _from_parts(parts: list[Any], found: ReadRow) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            raise UnusableRow("a turn with parts other than text")
        keys = Keys(part)
        kind, text = keys.take(("type",)), keys.take(("text",))
        require_supported_keys(keys, found)
        if not isinstance(kind, str):
            raise UnusableRow("a turn with parts other than text")
        if kind in LEFT_OUT:
            found.repairs[LEFT_OUT[kind]] = None
            continue
        if kind != "text" or not isinstance(text, str):
            raise UnusableRow(DROPPED.get(kind, "a turn with parts other than text"))
        found.unread |= {f"{name} (of a part)": None for name in keys.unread()}
        texts.append(text)
    return "\n\n".join(texts)
