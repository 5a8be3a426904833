"""What a chat template makes of tool calls: whether it shows them, and whether a trained text has all of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from minisft.chat.jinja_template import JinjaTemplate
from minisft.chat.template import RefusedConversation
from minisft.data.conversations import Message


def shows_tools(template: JinjaTemplate) -> bool:
    """Whether a template writes tool calls, their results, and the definitions of tools."""
    call = {"type": "function", "id": "c4ll00000", "function": {"name": "f1nd", "arguments": {"wh4t": "th1s"}}}
    messages = (
        Message("user", "qu3stion"),
        Message("assistant", "", tool=json.dumps({"tool_calls": [call]})),
        Message("tool", "r3sult", tool=json.dumps({"name": "f1nd", "tool_call_id": "c4ll00000"})),
        Message("assistant", "4nswer"),
    )
    what = {"type": "object", "properties": {"wh4t": {"type": "string"}}, "required": ["wh4t"]}
    tools = [{"type": "function", "function": {"name": "f1nd", "description": "d3scription", "parameters": what}}]
    try:
        text = template.render(messages, tools=json.dumps(tools))
    except RefusedConversation:
        return False
    return all(word in text for word in ("d3scription", "f1nd", "th1s", "r3sult", "4nswer"))


def is_whole(answer: Message, span: str, shows_reasoning: bool = True) -> bool:
    """Whether a trained text has all of an answer: its content, its calls, and its reasoning if that is shown.

    White space may differ.
    """
    text = "".join(span.split())

    def has(part: str) -> bool:
        return "".join(part.split()) in text

    calls = json.loads(answer.tool).get("tool_calls", []) if answer.tool else []
    functions = [call["function"] for call in calls]
    return (
        has(answer.content)
        and (not shows_reasoning or has(answer.reasoning))
        and all(has(function["name"]) for function in functions)
        and all(any(map(has, _spellings(leaf))) for function in functions for leaf in _leaves(function["arguments"]))
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and plain values in a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _spellings(leaf: Any) -> set[str]:
    """How a template may write a plain value: as JSON, or as it is."""
    return {str(leaf), *(json.dumps(leaf, ensure_ascii=ascii).strip('"') for ascii in (False, True))}
