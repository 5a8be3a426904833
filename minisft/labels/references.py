"""What other implementations make of a conversation, for `check`: mistral-common and plain transformers."""

from __future__ import annotations

import json
from typing import Any

from minisft.chat.jinja_template import as_chat
from minisft.chat.mistral_reference import reference
from minisft.chat.render_process import render_as_transformers
from minisft.chat.template import ChatTemplate
from minisft.chat.tokenizers import Tokenizer
from minisft.data.conversations import Conversation
from minisft.data.tools import keys_of
from minisft.errors import UserError


def mistral_row(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]] | None:
    """Return mistral-common's ids and mask, or None if it cannot encode the conversation."""
    if not tokenizer.name.startswith("mistral:"):
        return None
    try:
        return reference(conversation, tokenizer.template_name)
    except UserError:  # mistral-common refuses empty answers
        return None


def transformers_prompt(conversation: Conversation, template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Return the ids of the first trained answer's prompt as `apply_chat_template` of transformers makes them.

    It keeps control tokens that a message spells as text, as it is asked to; by itself it misses
    added words that a template builds from parts, as `'<|' + role + '|>'`. The template is
    rendered by the same code in the rendering process, because it may be hostile. Raises
    `RefusedConversation`.
    """
    answer = next(i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.trained)
    request = {
        "messages": as_chat(conversation.messages[:answer], template.text_arguments),
        "tools": json.loads(conversation.tools) if conversation.tools else None,
        "add_generation_prompt": True,
    }
    control = tokenizer.hf.convert_ids_to_tokens(sorted(tokenizer.control_ids))
    text = render_as_transformers(template.jinja(), request, tokenizer.hf, control)
    return tokenizer.hf(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]


def has_control_key(conversation: Conversation, tokenizer: Any) -> bool:
    """Whether a key of a tool call or definition spells a control token.

    Plain transformers keeps control tokens in values as text, but not those in keys: its prompt is
    then no reference.
    """
    keys = [key for text in (conversation.tools, *(m.tool for m in conversation.messages)) for key in keys_of(text)]
    spelt = tokenizer.hf("\n".join(keys), add_special_tokens=False)["input_ids"] if keys else []
    return not tokenizer.control_ids.isdisjoint(spelt)
