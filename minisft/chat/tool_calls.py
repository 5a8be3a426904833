"""Whether a chat template has a place for tools."""

from __future__ import annotations

import json

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
    if "{'wh4t'" in text:  # Python's spelling of an object, which no caller can parse
        return False
    return all(word in text for word in ("d3scription", "f1nd", "th1s", "r3sult", "4nswer"))
