"""Turn a generated reply into the message that, in a training row, would have given its ids.

A model's own template may write text of its own around a content (`<|channel|>final<|message|>`),
and a thought before it. A model that was trained with this template writes them too. In the next
prompt the template writes them again, so they may not be in the content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from minisft.chat.own_template import OwnTemplate
from minisft.chat.template import ChatTemplate, RefusedConversation
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError
from minisft.evaluation.eval_set import UNLIMITED
from minisft.labels.encode_row import IGNORE_INDEX, encode

CONTENT, THOUGHT = "c0ntent", "th0ught"  # stand for the parts of a reply while the template is rendered


def reply_message(
    reply: str,
    reply_ids: Sequence[int],
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: HuggingFaceTokenizer,
) -> Message:
    """Return the message of a `reply`, decoded from `reply_ids`, to the conversation `messages`.

    With a model's own template, text that the template writes around a content is removed, and a
    thought becomes the message's reasoning, if encoding the message gives the reply again: its ids,
    or else its text but for white space. Otherwise the content is the reply as it is.
    """
    as_it_is = Message("assistant", reply.strip())
    if not isinstance(template, OwnTemplate):
        return as_it_is
    trained: list[tuple[Message, list[int]]] = []
    for message in _split_up(reply, messages, template):
        with suppress(UserError):  # the template changes such an answer, or it cannot be encoded
            trained.append((message, _trained_ids(message, messages, template, tokenizer)))
    for message, ids in trained:
        if ids[: len(reply_ids)] == list(reply_ids):
            return message
    for message, ids in trained:
        if _without_spaces(tokenizer.decode(ids)).startswith(_without_spaces(reply)):
            return message
    return as_it_is


def _split_up(reply: str, messages: Sequence[Message], template: OwnTemplate) -> Iterator[Message]:
    """Yield the messages that `reply` may be: with a thought first, and each split exactly first."""
    for mark in (THOUGHT, ""):
        with suppress(RefusedConversation):
            written = _written(messages, Message("assistant", CONTENT, reasoning=mark), template)
            if any(written.count(part) != 1 for part in (CONTENT, mark) if part):
                continue
            before, _, after = written.partition(CONTENT)
            opening, _, closing = before.partition(mark) if mark else (before, "", "")
            if mark and not closing.strip():
                continue  # nothing separates a thought from the content
            yield from _parts(reply, opening, closing, after)
            yield from _parts(reply.strip(), opening.strip(), closing.strip(), after.strip(), strips=True)


def _written(messages: Sequence[Message], answer: Message, template: OwnTemplate) -> str:
    """Return what the template writes between its generation prompt and the token that ends an answer."""
    prompt = template.render(messages, prompt=True)
    whole = template.render([*messages, answer])
    begin = whole.find(CONTENT, len(prompt))
    if begin < 0 or not whole.startswith(prompt):
        raise RefusedConversation("the template's generation prompt is not what it writes before an answer")
    return whole[len(prompt) : template.end_token(whole, begin, len(whole)).start()]


def _parts(reply: str, opening: str, closing: str, after: str, strips: bool = False) -> Iterator[Message]:
    """Yield the message between the texts of the template, if the reply has them.

    A reply that was cut off may lack the text after the content. `strips`: whether white space
    beside the texts belongs to neither part.
    """
    if not reply.startswith(opening):
        return
    thought, content = "", reply[len(opening) :]
    if closing:
        thought, found, content = content.partition(closing)
        if not found:
            return
    content = content.removesuffix(after)
    if strips:
        thought, content = thought.strip(), content.strip()
    yield Message("assistant", content, reasoning=thought)


def _trained_ids(
    message: Message, messages: Sequence[Message], template: ChatTemplate, tokenizer: HuggingFaceTokenizer
) -> list[int]:
    """Return the ids that a training row has behind the prompt of its last answer, `message`."""
    history = [replace(m, trained=False) if m.role == "assistant" else m for m in messages]
    row = encode(Conversation("chat", (*history, message)), template, tokenizer, UNLIMITED)
    begin = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))
    return row.input_ids[begin:]


def _without_spaces(text: str) -> str:
    return "".join(text.split())
