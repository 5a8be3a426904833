"""Where the answers are in a conversation's rendering, found by the prompt of each turn.

This is the way for templates that change contents, and for tool calls: one rendering for each
prompt and each answer, and no assumption about what the template writes around a content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import Any

from minisft.chat.jinja_template import JinjaTemplate, Piece
from minisft.chat.template import RefusedConversation
from minisft.data.conversations import Message


def labelled_by_prompts(
    template: JinjaTemplate, messages: Sequence[Message], tools: str = ""
) -> tuple[list[Piece], frozenset[int]]:
    """The pieces of a rendering in which each answer begins where its turn's own prompt ends.

    An answer whose content or calls the template changes is not trained; it is then in the
    second value. Texts of contents that spell a control token are stand-ins in the pieces.
    Raises `RefusedConversation`.
    """
    hidden, hidden_tools = template.hidden(messages), template.hide_json(tools)
    whole = template.render_safely(hidden, tools=hidden_tools)
    if template.shown(whole) != template.render(messages, tools=tools):
        raise RefusedConversation("the template treats control tokens in a text in a way of its own")
    begins: list[tuple[int, int]] = []  # where an answer begins, and its message
    for i, message in enumerate(hidden):
        if message.role == "assistant":
            prompt = template.render(hidden[:i], prompt=True, tools=hidden_tools)
            if whole.startswith(prompt) and len(prompt) >= max(begins, default=(0, 0))[0]:
                begins.append((len(prompt), i))
    answers: list[tuple[int, int, int]] = []
    with_reasoning = shows_reasoning(hidden, whole)
    bounds = [*(begin for begin, _ in begins[1:]), len(whole)]
    for (begin, i), bound in zip(begins, bounds, strict=False):
        # What follows this answer is no part of it: a rendering that ends with it has the same text so far.
        upto = template.render(hidden[: i + 1], tools=hidden_tools)
        bound = min(bound, len(commonprefix([whole, upto])))  # noqa: RUF071 (texts, not paths)
        with suppress(RefusedConversation):  # this answer cannot be trained where it is
            stop = template.end_token(whole, begin, bound).end()
            # The generation prompt may have the beginning of an answer, such as `<think>`.
            opened = template.render(hidden[:i], tools=hidden_tools)
            start = len(opened) if whole.startswith(opened) else begin
            if is_whole(hidden[i], whole[min(start, begin) : stop], with_reasoning):
                answers.append((begin, stop, i))
    others = frozenset(i for i, m in enumerate(hidden) if m.role == "assistant") - {i for _, _, i in answers}
    if not answers:
        raise RefusedConversation(
            "the template changes every answer, or writes before it what is not its generation prompt"
        )
    pieces = []
    cursor = 0
    for begin, stop, i in answers:
        pieces += [Piece(whole[cursor:begin]), Piece(whole[begin:stop], answer=i)]
        cursor = stop
    return [*pieces, Piece(whole[cursor:])], others


def shows_reasoning(messages: Sequence[Message], rendered: str) -> bool:
    """Whether the reasoning of an answer is in what a template renders; white space may differ."""
    text = "".join(rendered.split())
    return any(m.reasoning and "".join(m.reasoning.split()) in text for m in messages)


def is_whole(answer: Message, span: str, with_reasoning: bool = True) -> bool:
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
        and (not with_reasoning or has(answer.reasoning))
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
