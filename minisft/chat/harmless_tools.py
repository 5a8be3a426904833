"""Tool calls and definitions without what the data chose: no part of them can become a control token.

A template may join any text to its own, keys included: of an argument `s`, `'<' + key + '>'` makes
`<s>`. What it renders of harmless tools shows which control tokens are its own.
"""

from __future__ import annotations

import json
from typing import Any

# The keys that templates read by name, where OpenAI's format and JSON schemas have them.
_CALL = ("tool_calls", "type", "function", "name", "arguments", "id", "tool_call_id")
_TOOL = ("description", "parameters", "return", "returns", "response", "strict")
_SCHEMA = ("properties", "required", "items", "enum", "default", "const", "anyOf", "oneOf", "allOf", "not", "title")
_MORE = ("format", "nullable", "minimum", "maximum", "additionalProperties", "patternProperties", "$defs", "$ref")
READ_BY_NAME = frozenset((*_CALL, *_TOOL, *_SCHEMA, *_MORE, "definitions"))
NAMES = frozenset(("properties", "$defs", "definitions", "patternProperties"))  # whose keys are names
DATA = frozenset(("arguments", "default", "enum", "const"))  # whose keys and values are data, at any depth
TYPES = frozenset(("function", "object", "string", "integer", "number", "boolean", "array", "null"))
STRING, NUMBER = "m4rk", 90817263


def harmless(text: str, names: dict[str, str]) -> str:
    """JSON text of tools with other keys, strings and numbers than those that the data chose.

    What a template looks for stays: the keys and types of calls and schemas, where they have their
    meaning. `names` collects the names that the others get, so that one key has one name.
    """

    def renamed(key: str) -> str:
        return names.setdefault(key, f"k3y{len(names)}")

    def data(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(key): data(one) for key, one in value.items()}
        if isinstance(value, list):
            return [data(one) for one in value]
        if value is None or isinstance(value, bool):
            return value
        return STRING if isinstance(value, str) else NUMBER

    def under(key: str, value: Any) -> Any:
        if key in DATA or key not in READ_BY_NAME:
            return data(value)
        if key in NAMES and isinstance(value, dict):
            return {renamed(name): schema(one) for name, one in value.items()}
        if key == "type":
            types = value if isinstance(value, list) else [value]
            return value if all(isinstance(one, str) and one in TYPES for one in types) else data(value)
        return schema(value)

    def schema(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in READ_BY_NAME else renamed(key): under(key, one) for key, one in value.items()}
        return [schema(one) for one in value] if isinstance(value, list) else data(value)

    return json.dumps(schema(json.loads(text))) if text else ""
