"""Compute reference ids and masks with mistral-common, independently of this package's templates.

Messages pass through the normalizer and the instruct tokenizer of mistral-common, by its public
classes. For the mask each normalized message is encoded alone with the same tokenizer: an answer is
trained completely, including its EOS, as in mistral-finetune.
"""

from __future__ import annotations

import functools
from typing import Any

from minisft.data.conversations import Conversation
from minisft.errors import UserError

VERSIONS = ("v1", "v2", "v3", "v3-tekken", "v7")


def reference(conversation: Conversation, version: str) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation and a mask of the trained ones; two lists of equal length.

    Any order of roles is allowed: mistral-common's validator, which would reject some, is not
    called. Raises `UserError` for an unknown version and for conversations that mistral-common
    cannot encode (an empty answer), and `AssertionError` if the ids of the single messages differ
    from those of the conversation.
    """
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    instruct, normalizer = _tokenizer(version)
    request = normalizer.from_chat_completion_request(ChatCompletionRequest(messages=_messages(conversation)))
    try:
        ids = instruct.encode_instruct(request).tokens
        parts = _parts(instruct, request)
    except MistralCommonException as error:
        raise UserError(f"mistral-common cannot encode conversation {conversation.id}: {error}") from error
    if [token for part, _ in parts for token in part] != ids:
        raise AssertionError(f"mistral-common {version}: the messages of {conversation.id} do not add up to its ids")
    return ids, [trained for part, trained in parts for _ in part]


@functools.cache
def _tokenizer(version: str) -> tuple[Any, Any]:
    """The instruct tokenizer of a version, and a normalizer that keeps the weights of answers."""
    from mistral_common.protocol.instruct.messages import (
        FinetuningAssistantMessage,
        SystemMessage,
        ToolMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if version not in VERSIONS:
        raise UserError(f"there is no reference for version {version!r}: use one of {', '.join(VERSIONS)}")
    tokenizer = MistralTokenizer.v3(is_tekken=True) if version == "v3-tekken" else getattr(MistralTokenizer, version)()
    normalizer_class = type(get_normalizer(tokenizer.version, None))
    normalizer = normalizer_class(
        UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest, None
    )
    return tokenizer.instruct_tokenizer, normalizer


def _messages(conversation: Conversation) -> list[Any]:
    from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage, SystemMessage, UserMessage

    classes = {"system": SystemMessage, "user": UserMessage}
    return [
        classes[m.role](content=m.content)
        if m.role in classes
        else FinetuningAssistantMessage(content=m.content, weight=float(m.trained))
        for m in conversation.messages
    ]


def _parts(instruct: Any, request: Any) -> list[tuple[list[int], bool]]:
    """The ids of BOS and of each message, encoded separately, and whether they are trained."""
    first, last = instruct.find_first_last_user(request)
    parts = [(instruct.start(), False)]
    for i, message in enumerate(request.messages):
        if message.role == "assistant":
            parts.append((instruct.encode_assistant_message(message, i < last), message.weight != 0))
        elif message.role == "system":
            parts.append((instruct.encode_system_message(message)[0], False))
        else:
            ids, *_ = instruct.encode_user_message(message, [], i == last, i == first, request.system_prompt)
            parts.append((ids, False))
    return parts
