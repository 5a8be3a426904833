"""Clean raw rows of several formats into conversations with alternating turns.

Every row is counted exactly once in the `Ledger`: as a kept row, or as dropped for a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minisft.data.html_escapes import is_escaped, unescaped
from minisft.data.ledger import Ledger
from minisft.data.messages import IS_JSON, Message, UnusableRow, encodable
from minisft.data.row_formats import as_object, own_id, read_row
from minisft.data.tools import changed_strings, strings_of

LONGEST_MESSAGE = 2_000_000  # characters: longer than any context window, small enough for the memory


@dataclass(frozen=True, slots=True)
class Conversation:
    """A clean conversation: user and assistant turns alternate, and the last turn is an answer.

    System prompts may appear anywhere before the last answer. Two answers follow each other only if
    one of them is trained and the other is not, or the first one calls tools. Results of tools
    follow the answer that calls them. `tools` are the definitions of the tools, as JSON text.
    """

    id: str
    messages: tuple[Message, ...]
    tools: str = ""

    @property
    def characters(self) -> int:
        """The number of characters in all messages, reasoning and tools included."""
        return len(self.tools) + sum(len(m.content) + len(m.reasoning) + len(m.tool) for m in self.messages)

    @property
    def answers(self) -> int:
        """The number of assistant messages."""
        return sum(m.role == "assistant" for m in self.messages)

    def to_sharegpt(self) -> dict[str, Any]:
        """The conversation as a ShareGPT row, to be written to a file."""
        names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
        turns = [
            {"from": names[m.role], "value": m.content}
            | ({} if m.trained else {"weight": 0})
            | ({"reasoning_content": m.reasoning} if m.reasoning else {})
            | (json.loads(m.tool) if m.tool else {})
            for m in self.messages
        ]
        tools = {"tools": json.loads(self.tools)} if self.tools else {}
        return {"id": self.id, "conversations": turns, **tools}


def only_last_answer(conversation: Conversation) -> Conversation:
    """The same conversation with only its last answer trained (if that answer has weight 1)."""
    last = max(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    messages = tuple(
        replace(m, trained=m.trained and i == last) if m.role == "assistant" else m
        for i, m in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)


def one_per_answer(conversation: Conversation) -> Iterator[Conversation]:
    """Yield one conversation per trained answer: all messages up to it, only that answer trained.

    This is what inference sees at each turn, even with templates that move the system prompt to the
    last user turn (v2, v3). The id of answer number n is `<id>@<n>`, counted from 1.
    """
    number = 0
    before: list[Message] = []
    for message in conversation.messages:
        if message.role == "assistant":
            number += 1
            if message.trained:
                yield replace(conversation, id=f"{conversation.id}@{number}", messages=(*before, message))
            message = replace(message, trained=False)
        before.append(message)


# --- from raw rows -----------------------------------------------------------------------------------------


def clean(
    row: Any, where: str, ledger: Ledger, escaped: bool | None = None, reads_tools: bool = False
) -> Conversation | None:
    """Turn one raw row into a conversation that alternates and ends in an answer.

    `row` may have any format that `row_formats` reads, or be an `UnusableRow`, the reason why it
    could not be read. `where` names a row that has no id. `escaped` tells whether its file was
    HTML-escaped (see `html_escapes`); with None the row is judged by itself. `reads_tools`: whether
    a chat template can show tools; otherwise a row with tools is dropped. Returns None for a
    dropped row; drops and repairs are counted in `ledger`.
    """
    row_id = where
    try:
        row, was_text = as_object(row)
        row_id = own_id(row) or where
        if was_text:
            ledger.repair(IS_JSON, row_id)
        parsed = read_row(row, reads_tools)
        for reason in parsed.repairs:
            if not (was_text and reason == IS_JSON):  # the ledger counts a row once per reason
                ledger.repair(reason, row_id)
        messages, tools = _repaired_text(parsed.messages, parsed.tools, row_id, ledger, escaped)
        conversation = Conversation(row_id, tuple(_alternating(messages, row_id, ledger)), tools)
    except UnusableRow as reason:
        ledger.drop(str(reason), row_id)
        return None
    for name in parsed.unread:
        ledger.leave_unread(name, row_id)
    return conversation


# --- text --------------------------------------------------------------------------------------------------


def _repaired_text(
    messages: list[Message], tools: str, row_id: str, ledger: Ledger, escaped: bool | None
) -> tuple[list[Message], str]:
    """The messages and the definitions of tools with all texts repaired, those inside calls included."""
    _require_length(messages)
    of_messages = [text for m in messages for text in (m.content, m.reasoning, *(strings_of(m.tool) if m.tool else ()))]
    texts = original = of_messages + strings_of(tools)
    for reason, repair in _TEXT_REPAIRS:
        if repair is unescaped and not (is_escaped(texts, turns=1, kinds=1) if escaped is None else escaped):
            continue
        repaired = repair(texts)
        if repaired != texts:
            ledger.repair(reason, row_id)
            texts = repaired
    if texts is original:
        return messages, tools
    rest = iter(texts)

    def following(_: str) -> str:
        return next(rest)

    # In the order in which the texts were listed.
    repaired_messages = [
        replace(m, content=next(rest), reasoning=next(rest), tool=changed_strings(m.tool, following)) for m in messages
    ]
    return repaired_messages, changed_strings(tools, following)


def _without_lone_bytes(texts: list[str]) -> list[str]:
    # The reader marks bytes that are not UTF-8 with low surrogates (Python's `surrogateescape`).
    # `isascii` takes constant time, and most texts are ASCII.
    return [text if text.isascii() else re.sub("[\udc80-\udcff]+", "\N{REPLACEMENT CHARACTER}", text) for text in texts]


def _with_whole_characters(texts: list[str]) -> list[str]:
    return [encodable(text) for text in texts]


def _with_line_feeds(texts: list[str]) -> list[str]:
    return [text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text for text in texts]


# The order matters: unescaping may produce carriage returns (`&#13;`).
_TEXT_REPAIRS = (
    ("invalid UTF-8: replaced", _without_lone_bytes),
    ("half a surrogate pair: replaced", _with_whole_characters),
    ("HTML-escaped text: unescaped", unescaped),
    ("CR or CRLF line endings: converted to LF", _with_line_feeds),
)


# --- turns -------------------------------------------------------------------------------------------------


def _alternating(messages: list[Message], row_id: str, ledger: Ledger) -> list[Message]:
    """Make user and assistant turns alternate and end in an answer; system prompts stay in place.

    Consecutive turns of one role are joined, except answers of different weight, as in Mistral's
    own normalization. Raises `UnusableRow` for the result of a tool that was not called.
    """
    turns: list[Message] = []
    last = None  # index in `turns` of the last turn that is no system prompt
    joined: dict[int, list[str]] = {}  # index in `turns` -> its texts, joined at the end in linear time
    repairs: dict[str, None] = {}  # an ordered set: the ledger counts a row once per reason
    for message in messages:
        if message.role == "system":
            if not is_blank(message.content):
                turns.append(message)
        elif last is None and message.role == "assistant":
            repairs["answer before any question: removed"] = None
        elif message.role == "tool":
            if last is None or not (turns[last].role == "tool" or _calls(turns[last])):
                raise UnusableRow("the result of a tool that was not called")
            last = len(turns)
            turns.append(message)
        elif is_blank(message.content) and not _calls(message):
            repairs["empty turn: cut there"] = None
            break
        elif last is not None and _continues(turns[last], message):
            repairs["consecutive turns of one role: joined"] = None
            joined.setdefault(last, [turns[last].content]).append(message.content)
            thoughts = "\n\n".join(filter(None, (turns[last].reasoning, message.reasoning)))
            turns[last] = replace(turns[last], reasoning=thoughts, tool=message.tool)
        else:
            last = len(turns)
            turns.append(message)
    for i, texts in joined.items():
        turns[i] = replace(turns[i], content="\n\n".join(filter(None, texts)))
    answers = sum(m.role == "assistant" for m in turns)
    while turns and turns[-1].role != "assistant":
        if turns.pop().role in ("user", "tool") and answers:
            repairs["last question has no answer: removed"] = None
    for reason in repairs:
        ledger.repair(reason, row_id)
    if not answers:
        raise UnusableRow("no question with an answer")
    if not any(m.trained for m in turns if m.role == "assistant"):
        raise UnusableRow("every answer has weight 0")
    _require_length(turns)  # again, because joined turns are longer
    return turns


def _require_length(messages: list[Message]) -> None:
    if any(max(len(m.content), len(m.reasoning), len(m.tool)) > LONGEST_MESSAGE for m in messages):
        raise UnusableRow(f"a message of more than {LONGEST_MESSAGE:,} characters")


def _continues(previous: Message, message: Message) -> bool:
    """Whether a message is joined to the previous turn."""
    if previous.role != message.role or _calls(previous):
        return False
    return message.role == "user" or previous.trained == message.trained


def _calls(message: Message) -> bool:
    """Whether a message is an answer that calls tools."""
    return message.role == "assistant" and bool(message.tool)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character.

    Spaces, line ends and invisible characters do not count; ShareGPT has answers that consist of a
    zero-width space.
    """
    return not any(c.isprintable() and not c.isspace() for c in text)
