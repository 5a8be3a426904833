"""Read the messages of rows in all common formats: turns, columns, preference pairs and history.

`messages` defines which keys are read and what each of them means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from minisft.data import tools
from minisft.data.json_text import KeyTwiceError, parse_row, unreadable_row
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
    TRAINED,
    TURNS,
    WEIGHT,
    Keys,
    Message,
    ReadRow,
    UnusableRow,
    as_text,
    encodable,
    is_empty,
    is_none,
    message_of,
    messages_of,
    require_supported_keys,
    spelled_weight,
    text_of,
    tools_json,
    weight,
)

SHAPES = (
    "conversations (from/value), messages (role/content), instruction/output, prompt/completion or question/response"
)
FLAGS = dict.fromkeys(("true", "1", "desirable"), True) | dict.fromkeys(
    ("false", "0", "undesirable", "rejected"), False
)


def read_row(row: dict[str, Any], reads_tools: bool = False) -> ReadRow:
    """The messages of one row before cleaning. Raises `UnusableRow` with the reason if none.

    The system prompt and earlier turns are taken from columns of the row, unless the conversation
    already begins with them. `reads_tools`: see `ReadRow`.
    """
    parsed = ReadRow(reads_tools)
    keys = Keys(row)
    if own_id(row) is not None:
        keys.take(("id",))
    require_supported_keys(keys, parsed)
    _require_wanted(keys)
    if reads_tools and not is_none(definitions := keys.take(tools.DEFINITIONS)):
        parsed.tools = tools_json(tools.definitions_of(definitions), parsed)
    messages = _joined(_history(keys.take(HISTORY), parsed), _conversation_messages(keys, parsed))
    if not messages:
        raise UnusableRow("empty conversation")
    first_prompt = messages[0].content if messages[0].role == "system" else ""
    if not first_prompt.strip() or keys.look(SYSTEM)[1] == first_prompt:
        messages = [*_system_prompt(keys.take(SYSTEM), first_prompt, parsed), *messages]
    parsed.messages = messages
    parsed.unread |= dict.fromkeys(keys.unread())
    return parsed


def as_object(row: Any) -> tuple[dict[str, Any], bool]:
    """The row as a dictionary, and whether it was JSON inside a JSON string.

    Raises `UnusableRow` if it is not an object or a list of turns.
    """
    if isinstance(row, UnusableRow):
        raise row
    value = _from_json(row) if isinstance(row, str) else row
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = {TURNS[0]: value}  # a bare list of turns
    if not isinstance(value, dict):
        raise UnusableRow("row is not an object")
    return value, isinstance(row, str)


def own_id(row: dict[str, Any]) -> str | None:
    """The id of the row as text, or None if it has none that is a number or a short text."""
    value = row.get("id")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return as_text(value)
    return encodable(value) if isinstance(value, str) and 0 < len(value) <= LONGEST_ID else None


def has_known_shape(row: dict[str, Any]) -> bool:
    """Whether an object has keys of a conversation row."""
    return _has_columns(row) or not row.keys().isdisjoint((*TURNS, *CHOSEN, "instruction"))


def _has_columns(row: dict[str, Any]) -> bool:
    return not row.keys().isdisjoint(QUESTION) and not row.keys().isdisjoint(_answers(row))


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """The keys that may hold the answer. `chosen` is not one of them if it is a boolean mark."""
    return ANSWER if isinstance(row.get(CHOSEN[0]), bool) else (*ANSWER, *CHOSEN)


def texts_of(row: Any) -> Iterator[str]:
    """The texts in a raw row of any format, usable or not: for counts and HTML detection."""
    if isinstance(row, str):
        yield row
    if isinstance(row, list):
        row = {TURNS[0]: row}
    if not isinstance(row, dict):
        return
    turns = next((row[key] for key in TURNS if isinstance(row.get(key), list | str) and row[key]), None)
    texts: Iterable[Any]
    if isinstance(turns, list):
        texts = (turn.get("value") or turn.get("content") for turn in turns if isinstance(turn, dict))
    else:
        texts = (turns,) if turns else (row.get(key) for key in (*SYSTEM, *QUESTION, *GIVEN, *ANSWER))
    for text in texts:
        if isinstance(text, str):
            yield text


# --- marks and weights -------------------------------------------------------------------------------------


def _require_wanted(keys: Keys) -> None:
    """Raise `UnusableRow` if a row is marked as undesirable or has weight 0."""
    for name in (*DESIRABLE, *CHOSEN):
        value = keys.row.get(name)
        is_mark = isinstance(value, bool) or (name in DESIRABLE and _flag(value) is not None)
        if is_mark and not _flag(value):
            raise UnusableRow(f"marked as undesirable ({name})")
        if is_mark:
            keys.take((name,))
    values = {name: spelled_weight(keys.row.get(name)) for name in (*WEIGHT, *TRAINED)}
    if any(isinstance(values[name], list) and values[name] for name in WEIGHT):
        raise UnusableRow("weights of a row as a list")
    # Another text or object in a column of this name is no weight.
    if not weight(keys, [name for name, value in values.items() if not isinstance(value, str | list | dict)]):
        raise UnusableRow("a row of weight 0")


def _flag(value: Any) -> bool | None:
    """The boolean that a mark stands for; None if the value is not a mark."""
    if isinstance(value, str):
        return FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


# --- shapes ------------------------------------------------------------------------------------------------


def _conversation_messages(keys: Keys, parsed: ReadRow) -> list[Message]:
    """The messages of the row's turns, else of its columns, else of its preferred answer."""
    turns = _turns(keys, parsed)
    chosen = keys.look(CHOSEN)[1]
    has_chosen = not is_empty(chosen) and not isinstance(chosen, bool)
    if turns:
        messages = [message_of(turn, parsed) for turn in turns]
        roles = [message.role for message in messages if message.role != "system"]
        if has_chosen and roles[-1:] == ["user"]:  # preference data: the turns are only the prompt
            messages = _joined(messages, messages_of(keys.take(CHOSEN), "assistant", parsed))
        return messages
    if _has_columns(keys.row) and (turns is None or not is_empty(keys.look((*QUESTION, *GIVEN))[1])):
        return _from_columns(keys, parsed)
    if turns is not None:
        raise UnusableRow("empty conversation")
    if has_chosen:
        return messages_of(keys.take(CHOSEN), "assistant", parsed)
    if not keys.row.keys().isdisjoint(ROLE) and not keys.row.keys().isdisjoint(TEXT):
        raise UnusableRow("a turn by itself: make a list of the turns of each conversation")
    raise UnusableRow("row of an unknown shape")


def _turns(keys: Keys, parsed: ReadRow) -> list[Any] | None:
    """The first non-empty list of turns, else an empty one; None if the row has no list of turns.

    A list may also be JSON inside a string.
    """
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
            parsed.repairs[IS_JSON] = None
        if isinstance(turns, list):
            keys.take((key,))
            if turns:
                return turns
            empty = turns
    if not_json:
        raise UnusableRow("text in place of a list of turns")
    return empty


def _from_columns(keys: Keys, parsed: ReadRow) -> list[Message]:
    """The messages of a question and an answer column, each a text or a list of turns."""
    answers = _answers(keys.row)
    names = [keys.look(QUESTION)[0] or QUESTION[0], keys.look(answers)[0] or ANSWER[0]]
    parsed.repairs["/".join(names) + ": converted"] = None
    question, answer = keys.take(QUESTION), keys.take(answers)
    if not isinstance(question, list | dict):
        texts = ("" if text is None else text_of(text, "user", parsed) for text in (question, keys.take(GIVEN)))
        question = "\n\n".join(text for text in texts if text.strip())
    return _joined(
        messages_of(question, "user", parsed), messages_of("" if answer is None else answer, "assistant", parsed)
    )


def _joined(earlier: list[Message], later: list[Message]) -> list[Message]:
    """Join two parts of a conversation.

    If the later part repeats the earlier one, as in some preference data, it is returned alone.
    """
    without_system = [message for message in later if message.role != "system"]
    is_repeated = earlier and earlier in (later[: len(earlier)], without_system[: len(earlier)])
    return later if is_repeated else [*earlier, *later]


def _history(pairs: Any, parsed: ReadRow) -> list[Message]:
    """The messages of earlier turns: pairs of question and answer, or turns with a role."""
    if is_empty(pairs):
        return []
    messages = []
    for pair in pairs if isinstance(pairs, list) else [None]:  # anything but a list raises below
        if isinstance(pair, dict):
            messages.append(message_of(pair, parsed))
        elif isinstance(pair, list) and len(pair) == 2:
            if not is_empty(pair):
                texts = zip(("user", "assistant"), pair, strict=True)
                messages += [Message(role, text_of(text, role, parsed)) for role, text in texts]
        else:
            raise UnusableRow("a history that is not pairs of question and answer")
    return messages


def _system_prompt(value: Any, first_prompt: str, parsed: ReadRow) -> list[Message]:
    """The system prompt of a column, unless the conversation begins with the same one."""
    if is_empty(value) or value == first_prompt:
        return []
    if not isinstance(value, str | list):
        raise UnusableRow("a system prompt that is not text")
    return [Message("system", text_of(value, "system", parsed))]


def _from_json(text: str) -> Any:
    """Parse JSON inside a string. Raises `UnusableRow` if it is not JSON, or has a key twice."""
    try:
        return parse_row(text)
    except KeyTwiceError as error:
        raise unreadable_row(error) from None
    except (ValueError, RecursionError):
        raise UnusableRow("text in place of a list of turns") from None
