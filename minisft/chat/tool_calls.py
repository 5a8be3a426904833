"""Whether a chat template has a place for tools, and in which form it takes the arguments of calls."""

from __future__ import annotations

import json

from minisft.chat.jinja_template import JinjaTemplate
from minisft.chat.template import RefusedConversation
from minisft.data.conversations import Message

# A question, a call, its result and the answer; the definition of what is called.
_CALL = {"type": "function", "id": "c4ll00000", "function": {"name": "f1nd", "arguments": {"wh4t": "th1s"}}}
CALLING = (
    Message("user", "qu3stion"),
    Message("assistant", "", tool=json.dumps({"tool_calls": [_CALL]})),
    Message("tool", "r3sult", tool=json.dumps({"name": "f1nd", "tool_call_id": "c4ll00000"})),
    Message("assistant", "4nswer"),
)
_WHAT = {"type": "object", "properties": {"wh4t": {"type": "string"}}, "required": ["wh4t"]}
_FIND = {"name": "f1nd", "description": "d3scription", "parameters": _WHAT}
DEFINITIONS = json.dumps([{"type": "function", "function": _FIND}])


def shows_tools(template: JinjaTemplate) -> tuple[bool, bool]:
    """Whether a template writes tool calls and their results; whether it writes definitions of tools.

    It depends on `template.text_arguments`: some templates join a call's arguments to a text, which
    fails for an object, or gives Python's spelling of it.
    """
    try:
        text = template.render(CALLING, tools=DEFINITIONS)
    except RefusedConversation:
        return False, False
    arguments = '{"wh4t": "th1s"}' if template.text_arguments else "th1s"
    calls = all(word in text for word in ("f1nd", arguments, "r3sult", "4nswer"))
    # No caller can parse Python's spelling of an object.
    return calls and "{'wh4t'" not in text, "d3scription" in text
