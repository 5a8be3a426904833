"""Read messages from the turns of a row, and define every key of a row that is read.

Only this module knows which keys of a row, a turn or a part of a turn are read; `row_formats`
assembles the messages of whole rows. A key that changes what a row means is applied, or the row is
dropped for a counted reason. Every other key with a value is counted by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisft.data import tools
from minisft.data.ledger import UnusableRow
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
LONGEST_KEY = 60  # characters shown of an unread key

# Synonyms for one thing: the first key that has a value is read.
TURNS = ("conversations", "messages", "conversation")
QUESTION = ("instruction", "question", "prompt", "query")
GIVEN = ("input", "context")  # the text that an instruction refers to
ANSWER = ("output", "response", "completion", "answer")
CHOSEN = ("chosen",)  # the preferred answer; `rejected` is not read
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)  # earlier turns, as pairs of question and answer
ROLE, TEXT = ("from", "role"), ("value", "content")
WEIGHT = ("weight", "train")
TRAINED = ("loss", "training")  # equivalent to a weight if the value is a boolean
DESIRABLE = ("label", "kto_tag", "desirable")  # false marks an answer that must not be learned

IS_JSON = "JSON inside a string: parsed"  # a repair
# A key that drops the row (found in the row, a turn or a part of a turn) -> the reason.
DROPPED = {
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "input_image"), "needs images"),
    **dict.fromkeys(("video", "videos", "video_url"), "needs videos"),
    **dict.fromkeys(("audio", "audios", "audio_url", "input_audio"), "needs audio"),
    **dict.fromkeys((*tools.CALLS, "tool_use", "tool_result"), "tool calls that the template cannot show"),
    **dict.fromkeys(tools.DEFINITIONS, "tools that the template cannot show"),
    "documents": "documents that the template cannot show",
    **dict.fromkeys(("train_detail", "training_detail"), "weights for parts of an answer"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # of an answer; elsewhere it is left out
LEFT_OUT = dict.fromkeys(REASONING, "reasoning that belongs to no answer: left out")
# All keys of a row that are read. Other columns of a table need not be converted.
KEYS = frozenset(
    ("id", *TURNS, *QUESTION, *GIVEN, *ANSWER, *CHOSEN, *SYSTEM, *HISTORY, *WEIGHT, *TRAINED, *DESIRABLE)
) | frozenset((*DROPPED, *LEFT_OUT))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is `system`, `user`, `assistant` or `tool`; `content` is untrusted text.

    `trained` is the weight of the message in the loss. Only assistant messages are ever trained,
    and all of them are, except those that the data set marks with weight 0. `reasoning` is what the
    model thought before an answer, for templates that have a place for it. `tool` has the further
    keys of a chat message with tools, as JSON text: `tool_calls` of an answer, or the `name` and
    `tool_call_id` of a result.
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""
    tool: str = ""


@dataclass
class ReadRow:
    """The messages of a row, the repairs made to read them, and the keys that were not read.

    `repairs` and `unread` are ordered sets. `reads_tools`: whether tool calls, results and
    definitions are read; otherwise a row with them is unusable. `tools` are the definitions, as
    JSON text.
    """

    reads_tools: bool = False
    tools: str = ""
    messages: list[Message] = field(default_factory=list)
    repairs: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)


def encodable(text: str) -> str:
    """Replace half a surrogate pair, which JSON can escape but no tokenizer can encode, by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# --- keys --------------------------------------------------------------------------------------------------


class Keys:
    """The keys of a row, a turn or a part of a turn, with a record of which ones were read."""

    __slots__ = ("_read", "row")

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self._read: set[str] = set()

    def look(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of the keys `names` with a non-empty value, else the first that is not null.

        Returns the key and its value, or `("", None)` if all of them are absent or null.
        """
        present = [name for name in names if self.row.get(name) is not None]
        first = present[0] if present else ""
        name = next((name for name in present if not is_empty(self.row[name])), first)
        return name, self.row.get(name)

    def take(self, names: Sequence[str]) -> Any:
        """The value that `look` returns. Marks its key, and others with the same text, as read."""
        name, value = self.look(names)
        self._read.add(name)
        if isinstance(value, str):
            self._read.update(key for key in names if self.row.get(key) == value)
        return value

    def unread(self) -> Iterator[str]:
        """The names of all other keys with a value, safe to print."""
        for key, value in self.row.items():
            if key not in self._read and not is_empty(value):
                yield one_line(str(key)[: 2 * LONGEST_KEY], LONGEST_KEY) or "''"


def is_empty(value: Any, depth: int = 4) -> bool:
    """Whether a value is null, `""`, `[]`, or a list or object of only such values.

    Tables fill missing struct columns with the latter. `depth` limits how deep nested values are
    examined; anything deeper counts as not empty.
    """
    if value is None or value == "":
        return True
    if depth and isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return all(is_empty(item, depth - 1) for item in items)
    return False


def require_supported_keys(keys: Keys, found: ReadRow, reads: str = "") -> None:
    """Check for keys that text cannot represent.

    Raises `UnusableRow` for a key in `DROPPED` that has a value; records keys in `LEFT_OUT`, except
    the one that the caller `reads`, as repairs of the row `found`.
    """
    for key, value in keys.row.items():
        if key in DROPPED and not (found.reads_tools and key in (*tools.CALLS, *tools.DEFINITIONS)):
            if not is_none(keys.take((key,))):
                raise UnusableRow(DROPPED[key])
        elif key in LEFT_OUT and key != reads and isinstance(value, str | list | dict) and not is_empty(value):
            found.repairs[LEFT_OUT[key]] = None


def is_none(value: Any) -> bool:
    """Whether a value is empty, false, or empty JSON inside a string, as some tools write it."""
    return not value or is_empty(value) or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


_SPELLED = dict.fromkeys(("0", "0.", "0.0", "false"), 0) | dict.fromkeys(("1", "1.", "1.0", "true"), 1)


def spelled_weight(value: Any) -> Any:
    """A weight whose text is 0 or 1 in some spelling, as a number; any other value as it is."""
    return _SPELLED.get(value.strip().lower(), value) if isinstance(value, str) else value


def weight(keys: Keys, names: Sequence[str], is_answer: bool = True) -> bool:
    """Whether the keys `names` leave a row or turn trained.

    Weight 1 on a turn that is never trained (`is_answer` is False) has no effect and stays unread.
    Raises `UnusableRow` for a weight other than 0 or 1.
    """
    trained = True
    for name in names:
        value = spelled_weight(keys.row.get(name))
        # A number under `loss` or `training` is a measurement, not a weight.
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
    """The messages of a text with this role, of one turn, or of a list of turns.

    Repairs and unread keys are added to `found`. Raises `UnusableRow`.
    """
    if isinstance(value, list | dict):
        return [message_of(turn, found) for turn in (value if isinstance(value, list) else [value])]
    return [Message(role, text_of(value, role, found))]


def message_of(turn: Any, found: ReadRow) -> Message:
    """The message of one turn. Raises `UnusableRow` if it has no known role or no text."""
    if not isinstance(turn, dict):
        raise UnusableRow("a turn without role and text")
    if len(turn) == 2:  # fast path: nearly every turn has a role, a text and no other key
        role, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
        if isinstance(role, str) and isinstance(content, str) and role in ROLES:
            return Message(ROLES[role], content)
    keys = Keys(turn)
    reasoning_key, reasoning = _reasoning(keys)
    require_supported_keys(keys, found, reasoning_key)
    role = keys.take(ROLE)
    if not isinstance(role, str):
        raise UnusableRow("a turn without role and text")
    name = role.strip().lower()
    known_role = ROLES.get(name) or (tools.ROLES.get(name) if found.reads_tools else None)
    content = keys.take(TEXT)
    tool = ""
    if found.reads_tools:
        tool, content = _tool_part(keys, name, known_role, content, found)
    is_null = content is None and not turn.keys().isdisjoint(TEXT)
    content = "" if is_null else text_of(content, known_role, found)
    if known_role is None:
        raise UnusableRow(f"unknown role {role[:20]!r}")
    trained = weight(keys, (*WEIGHT, *TRAINED), known_role == "assistant")
    found.unread |= {f"{name} (of a turn)": None for name in keys.unread()}
    return Message(known_role, content, trained, reasoning, tool)


def _tool_part(keys: Keys, name: str, role: str | None, content: Any, found: ReadRow) -> tuple[str, Any]:
    """The further keys of a turn with tools, as JSON text, and its content.

    `name` is the role as the turn spells it. Raises `UnusableRow`.
    """
    calls = content if name == tools.CALL else keys.look(tools.CALLS)[1]
    if not (name == tools.CALL or is_none(calls)):
        keys.take(tools.CALLS)
        if role != "assistant":
            raise UnusableRow("tool calls of another role than the assistant")
    if role == "assistant" and not is_none(calls):
        written = tools_json({"tool_calls": tools.calls_of(calls, found.unread)}, found)
        return written, "" if name == tools.CALL else content or ""
    if role != "tool":
        return "", content
    of = {key: value for key in tools.RESULT if isinstance(value := keys.take((key,)), str)}
    is_text = isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))
    return tools_json(of, found) if of else "", content if is_text else tools.result_text(content)


def tools_json(value: Any, found: ReadRow) -> str:
    """JSON text of what a row says of tools; nulls are removed, which is a repair of the row `found`."""
    cleaned = tools.without_nulls(value)
    if cleaned != value:
        found.repairs[tools.NULL] = None
    return tools.as_json(cleaned)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _reasoning(keys: Keys) -> tuple[str, str]:
    """The key and the text of an answer's reasoning; two empty strings if the turn has none."""
    name, text = keys.look(REASONING)
    role = keys.look(ROLE)[1]
    is_answer = isinstance(role, str) and ROLES.get(role.strip().lower()) == "assistant"
    if not (is_answer and isinstance(text, str) and text.strip()):
        return "", ""
    keys.take(REASONING)
    return name, text


def text_of(content: Any, role: str | None, found: ReadRow) -> str:
    """The text of a turn. Raises `UnusableRow` if it has none.

    Text parts are joined by blank lines. An answer that is a number or a boolean becomes its JSON.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return _from_parts(content, found)
    text = as_text(content) if role == "assistant" else None
    if text is None:
        raise UnusableRow("a turn without role and text")
    found.repairs["number as an answer: converted to text"] = None
    return text


def as_text(value: Any) -> str | None:
    """A number or boolean as JSON; None for other values and for numbers not finite or too long."""
    # Comparisons with NaN are false, so `not <` also rejects NaN.
    if not isinstance(value, int | float) or not abs(value) < 10**LONGEST_ID:
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
