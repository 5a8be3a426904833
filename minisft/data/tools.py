"""Read tool calls, their results and the definitions of tools, in the form that chat templates of transformers read.

They are kept as JSON text: only a chat template decides how they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from minisft.data.json_text import parse_row
from minisft.data.ledger import UnusableRow
from minisft.text import one_line

CALLS = ("tool_calls", "function_call")  # of an answer
DEFINITIONS = ("tools", "functions")  # of a row
ARGUMENTS = ("arguments", "args", "input", "parameters")  # of a call: OpenAI, LangChain, Anthropic, Llama 3
RESULT = ("name", "tool_call_id")  # of a result: whose result it is
CALL = "function_call"  # ShareGPT's role of a turn whose text is a call
ROLES = {"tool": "tool", "observation": "tool", "function": "tool", CALL: "assistant"}
NULL = "null in a tool call or definition: removed"  # a repair: tables fill missing keys with null


def calls_of(value: Any, unread: dict[str, None]) -> list[dict[str, Any]]:
    """The calls of a turn: a list of calls, one call, or JSON of either as text.

    Each becomes `{"type": "function", "function": {"name", "arguments"}}`, with its `id` if it has
    one. Other keys with a value are added to `unread`. Raises `UnusableRow` for a call without a
    name, or whose arguments are no object.
    """
    value = _parsed(value)
    return [_call(_parsed(call), unread) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, unread: dict[str, None]) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not (isinstance(name := function.get("name"), str) and name.strip()):
        raise UnusableRow("a tool call without a name")
    key = next((key for key in ARGUMENTS if function.get(key) is not None), ARGUMENTS[0])
    given = function.get(key)
    arguments = {} if given in (None, "", []) else _parsed(given)
    if not isinstance(arguments, dict):
        raise UnusableRow("a tool call whose arguments are no object")
    for other, what in (call | function).items():
        if other not in ("type", "id", "index", "function", "name", key) and what not in (None, "", [], {}):
            unread[f"{one_line(other, 60)} (of a tool call)"] = None
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **call_id, "function": {"name": name, "arguments": arguments}}


def definitions_of(value: Any) -> list[dict[str, Any]]:
    """The definitions of a row's tools: a list of JSON schemas, or such a list as JSON text.

    Raises `UnusableRow` for anything else.
    """
    tools = _parsed(value)
    tools = [_parsed(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    wrapped = [{"type": "function", "function": tool} if _is_named(tool) else tool for tool in tools]
    if not all(isinstance(tool, dict) and _is_named(tool.get("function")) for tool in wrapped):
        raise UnusableRow("tools that are not functions with a name")
    return wrapped


def _is_named(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("name"), str)


def result_text(content: Any) -> str:
    """The text of a result that is no text: its JSON."""
    return as_json(content) if content is not None else ""


def as_json(value: Any) -> str:
    """The JSON text of a value. Raises `UnusableRow` if it has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise UnusableRow("a tool call or definition that is not JSON") from None


def strings_of(text: str) -> list[str]:
    """All strings in JSON text, keys included, in order; none of the text "" of a turn without tools."""
    found: list[str] = []

    def note(string: str) -> str:
        found.append(string)
        return string

    changed_strings(text, note)
    return found


def keys_of(text: str) -> list[str]:
    """All keys in JSON text; none of the text "" of a turn without tools."""
    found: list[str] = []
    json.loads(text or "null", object_pairs_hook=lambda pairs: found.extend(key for key, _ in pairs))
    return found


def changed_strings(text: str, change: Callable[[str], str]) -> str:
    """JSON text with each string, keys included, replaced by what `change` returns for it."""

    def changed(item: Any) -> Any:
        if isinstance(item, dict):
            return {change(name): changed(one) for name, one in item.items()}
        if isinstance(item, list):
            return [changed(one) for one in item]
        return change(item) if isinstance(item, str) else item

    return json.dumps(changed(json.loads(text)), ensure_ascii=False) if text else ""


def without_nulls(value: Any) -> Any:
    """A JSON value without the keys whose value is null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """The value, or the value of its JSON if it is text. Raises `UnusableRow`."""
    if not isinstance(value, str):
        return value
    try:
        return parse_row(value)
    except (ValueError, RecursionError):
        raise UnusableRow("a tool call or definition that is not JSON") from None
