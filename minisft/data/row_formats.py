"""Rows of all the shapes that people write, made into messages: turns, columns, preferences, earlier turns.

Which keys are read, and what a key means, is `messages`' to know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from minisft.data.messages import (
    ANSWER,
    CHOSEN,
    DESIRABLE,
    GIVEN,
    HISTORY,
    IS_JSON,
    LONGEST_ID,
    QUESTION,
    ROLE,
    SYSTEM,
    TEXT,
    TURNS,
    WEIGHT,
    Keys,
    Message,
    ReadRow,
    UnusableRow,
    as_text,
    encodable,
    is_empty,
    message_of,
    messages_of,
    require_supported_keys,
    text_of,
    weight,
)

SHAPES = (
    "conversations (from/value), messages (role/content), instruction/output, prompt/completion or question/response"
)
FLAGS = dict.fromkeys(("true", "1", "desirable"), True) | dict.fromkeys(
    ("false", "0", "undesirable", "rejected"), False
)


def read_row(row: dict[str, Any]) -> ReadRow:
    """The messages of one row, as they stand. Raises `UnusableRow` with the reason why there are none to be used.

    System prompt and earlier turns come from the row's own columns where the conversation does not begin with them.
    """
    found = ReadRow()
    keys = Keys(row)
    if own_id(row) is not None:
        keys.take(("id",))
    require_supported_keys(keys, found)
    _require_wanted(keys)
    messages = _after(_history(keys.take(HISTORY), found), _spoken(keys, found))
    if not messages:
        raise UnusableRow("empty conversation")
    own = messages[0].content if messages[0].role == "system" else ""
    if not own.strip() or keys.look(SYSTEM)[1] == own:
        messages = [*_system_prompt(keys.take(SYSTEM), own, found), *messages]
    found.messages = messages
    found.unread |= dict.fromkeys(keys.unread())
    return found


def as_object(row: Any) -> tuple[dict[str, Any], bool]:
    """The row as an object, and whether it was JSON inside a JSON string. Raises `UnusableRow`."""
    if isinstance(row, UnusableRow):
        raise row
    value = _from_json(row) if isinstance(row, str) else row
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = {TURNS[0]: value}  # a conversation without a name
    if not isinstance(value, dict):
        raise UnusableRow("row is not an object")
    return value, isinstance(row, str)


def own_id(row: dict[str, Any]) -> str | None:
    """The row's own id, if it is a name or a number as ids are."""
    own = row.get("id")
    if isinstance(own, int | float) and not isinstance(own, bool):
        return as_text(own)
    return encodable(own) if isinstance(own, str) and 0 < len(own) <= LONGEST_ID else None


def has_known_shape(row: dict[str, Any]) -> bool:
    """Whether the keys of an object are those of a row."""
    return _has_columns(row) or not row.keys().isdisjoint((*TURNS, *CHOSEN, "instruction"))


def _has_columns(row: dict[str, Any]) -> bool:
    return not row.keys().isdisjoint(QUESTION) and not row.keys().isdisjoint(_answers(row))


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """The keys that an answer may be under; `chosen` can also be a mark, true or false."""
    return ANSWER if isinstance(row.get(CHOSEN[0]), bool) else (*ANSWER, *CHOSEN)


def texts_of(row: Any) -> Iterator[str]:
    """The texts in a raw row, whatever its shape and whatever becomes of it."""
    if isinstance(row, str):
        yield row
    if isinstance(row, list):
        row = {TURNS[0]: row}
    if not isinstance(row, dict):
        return
    turns = next((row[key] for key in TURNS if isinstance(row.get(key), list | str) and row[key]), None)
    if isinstance(turns, list):
        texts = (turn.get("value") or turn.get("content") for turn in turns if isinstance(turn, dict))
    else:
        texts = (turns,) if turns else (row.get(key) for key in (*SYSTEM, *QUESTION, *GIVEN, *ANSWER))
    for text in texts:
        if isinstance(text, str):
            yield text


# --- whether a row is wanted -------------------------------------------------------------------------------


def _require_wanted(keys: Keys) -> None:
    """Refuse a row whose answers are marked as bad, or as not to be trained."""
    for name in (*DESIRABLE, *CHOSEN):
        value = keys.row.get(name)
        is_mark = isinstance(value, bool) or (name in DESIRABLE and _flag(value) is not None)
        if is_mark and not _flag(value):
            raise UnusableRow(f"marked as undesirable ({name})")
        if is_mark:
            keys.take((name,))
    numbers = [name for name in WEIGHT if isinstance(keys.row.get(name), int | float)]
    if not weight(keys, numbers):
        raise UnusableRow("a row of weight 0")


def _flag(value: Any) -> bool | None:
    """Whether a mark says yes or no; None for what is no mark."""
    if isinstance(value, str):
        return FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


# --- shapes ------------------------------------------------------------------------------------------------


def _spoken(keys: Keys, found: ReadRow) -> list[Message]:
    """The messages of the row's turns, or else of its columns."""
    turns = _turns(keys, found)
    chosen = keys.look(CHOSEN)[1]
    has_chosen = not is_empty(chosen) and not isinstance(chosen, bool)
    if turns:
        messages = [message_of(turn, found) for turn in turns]
        spoken = [message.role for message in messages if message.role != "system"]
        if has_chosen and spoken[-1:] == ["user"]:
            messages = _after(messages, messages_of(keys.take(CHOSEN), "assistant", found))
        return messages
    if _has_columns(keys.row) and (turns is None or not is_empty(keys.look((*QUESTION, *GIVEN))[1])):
        return _from_columns(keys, found)
    if turns is not None:
        raise UnusableRow("empty conversation")
    if has_chosen:
        return messages_of(keys.take(CHOSEN), "assistant", found)
    if not keys.row.keys().isdisjoint(ROLE) and not keys.row.keys().isdisjoint(TEXT):
        raise UnusableRow("a turn by itself: make a list of the turns of each conversation")
    raise UnusableRow("row of an unknown shape")


def _turns(keys: Keys, found: ReadRow) -> list[Any] | None:
    """The first list of turns that has any, else an empty one; None if there is none at all. It may be JSON itself."""
    empty = None
    not_json = False
    for key in TURNS:
        turns = keys.row.get(key)
        if isinstance(turns, str) and turns.strip():
            try:
                turns = _from_json(turns)
            except UnusableRow:
                not_json = True
                continue
            found.repairs[IS_JSON] = None
        if isinstance(turns, list):
            keys.take((key,))
            if turns:
                return turns
            empty = turns
    if not_json:
        raise UnusableRow("text in place of a list of turns")
    return empty


def _from_columns(keys: Keys, found: ReadRow) -> list[Message]:
    """One question and one answer, each a text or a list of turns."""
    answers = _answers(keys.row)
    names = [keys.look(QUESTION)[0] or QUESTION[0], keys.look(answers)[0] or ANSWER[0]]
    found.repairs["/".join(names) + ": converted"] = None
    question, answer = keys.take(QUESTION), keys.take(answers)
    if not isinstance(question, list | dict):
        texts = ("" if text is None else text_of(text, "user", found) for text in (question, keys.take(GIVEN)))
        question = "\n\n".join(text for text in texts if text.strip())
    return _after(
        messages_of(question, "user", found), messages_of("" if answer is None else answer, "assistant", found)
    )


def _after(earlier: list[Message], later: list[Message]) -> list[Message]:
    """Two parts of a conversation; the later one may begin with the earlier one, as some preference data does."""
    spoken = [message for message in later if message.role != "system"]
    is_repeated = earlier and earlier in (later[: len(earlier)], spoken[: len(earlier)])
    return later if is_repeated else [*earlier, *later]


def _history(pairs: Any, found: ReadRow) -> list[Message]:
    if is_empty(pairs):
        return []
    messages = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if isinstance(pair, dict):
            messages.append(message_of(pair, found))
        elif isinstance(pair, list) and len(pair) == 2:
            if not is_empty(pair):
                texts = zip(("user", "assistant"), pair, strict=True)
                messages += [Message(role, text_of(text, role, found)) for role, text in texts]
        else:
            raise UnusableRow("a history that is not pairs of question and answer")
    return messages


def _system_prompt(value: Any, own: str, found: ReadRow) -> list[Message]:
    """The prompt of a column, unless the conversation begins with the same one, its `own`."""
    if is_empty(value) or value == own:
        return []
    if not isinstance(value, str | list):
        raise UnusableRow("a system prompt that is not text")
    return [Message("system", text_of(value, "system", found))]


def _from_json(text: str) -> Any:
    """The value of JSON that stands in a text. Raises `UnusableRow`."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise UnusableRow("text in place of a list of turns") from None
