"""The control tokens and added words that a chat template writes by itself, around any message.

A template is a program, so they are found by rendering examples: messages of all roles, reasoning,
tool calls, their results and definitions of tools. An example that the template refuses is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minisft.chat.pieces import SPACE_MARK
from minisft.chat.template import RefusedConversation
from minisft.chat.tool_calls import CALLING, DEFINITIONS
from minisft.data.conversations import Message

if TYPE_CHECKING:
    from minisft.chat.jinja_template import JinjaTemplate

_QUESTION, _ANSWER, _SYSTEM = Message("user", "qu3stion"), Message("assistant", "4nswer"), Message("system", "syst3m")
_THINKING = replace(_ANSWER, reasoning="th0ught")
EXCHANGES: tuple[tuple[Message, ...], ...] = (
    (_QUESTION, _ANSWER, _QUESTION),
    (_SYSTEM, _QUESTION, _ANSWER, _QUESTION, _ANSWER),
    (_QUESTION, _QUESTION, _ANSWER, _ANSWER),
    (_SYSTEM, _SYSTEM, _QUESTION, _SYSTEM, _ANSWER, _SYSTEM),
    (_ANSWER, _QUESTION),
    (_QUESTION, _THINKING),
    (_QUESTION, _THINKING, _QUESTION, _THINKING),
)
_LOOKED_UP = (CALLING[0], *CALLING[1:3] * 2, *CALLING[3:])  # two calls, one after the other
_AT_ONCE = (*CALLING[:2], CALLING[2], *CALLING[2:], *CALLING)
WITH_TOOLS: tuple[tuple[Message, ...], ...] = (CALLING, (_SYSTEM, *CALLING), _LOOKED_UP, _AT_ONCE)

_EXAMPLES = list(itertools.chain(*EXCHANGES, *WITH_TOOLS))
_TEXTS = "\n".join([DEFINITIONS, *(f"{m.role}\n{m.content}\n{m.reasoning}\n{m.tool}" for m in _EXAMPLES)])


def renderings(template: JinjaTemplate, with_tools: bool = True) -> Iterator[str]:
    """What a template writes around the examples that it takes, with and without a generation prompt."""
    of_tools = itertools.product(WITH_TOOLS if with_tools else (), ("", DEFINITIONS), (False, True))
    examples = [*((messages, "", False) for messages in EXCHANGES), *of_tools]
    for (messages, tools, text_arguments), prompt in itertools.product(examples, (False, True)):
        with suppress(RefusedConversation):
            yield replace(template, text_arguments=text_arguments).render(messages, prompt, tools)


def words_of_template(rendered: str, words: Collection[str]) -> Iterator[str]:
    """The added words that mark a turn in what a template writes.

    A word such as `<think>`, which `</think>` closes, marks a part of a text: texts may have it, as
    in transformers. White space and words of the examples are ordinary text.
    """
    for word in words:
        is_text = word in _TEXTS or not word.replace(SPACE_MARK, " ").strip()
        if word in rendered and _partner(word) not in words and not is_text:
            yield word


def _partner(word: str) -> str:
    """`</think>` of `<think>`, and the other way round."""
    return word.replace("</", "<", 1) if word.startswith("</") else word.replace("<", "</", 1)


@dataclass(frozen=True)
class ControlOrder:
    """Which control tokens a template writes, and which of the `common` ones after which; "" is the start."""

    known: frozenset[str]
    common: frozenset[str]
    pairs: frozenset[tuple[str, str]]

    def allows(self, before: str, token: str) -> bool:
        """Whether the template may write `token` next after the control token `before`.

        Of tokens that only some messages have, any order is allowed: no examples have all of it.
        """
        return token in self.known and ((before, token) in self.pairs or not {before, token} <= self.common)


def control_order(template: JinjaTemplate, has_tools: bool) -> ControlOrder:
    """The order of control tokens in a template's renderings; what its source spells is known, too."""
    pattern: re.Pattern[str] = template.control_pattern
    found = [pattern.findall(text) for text in renderings(template, has_tools)]
    common: set[str] = {""}
    for messages in EXCHANGES[:2]:
        with suppress(RefusedConversation):
            common |= {*pattern.findall(template.render(messages))}
    known = frozenset(itertools.chain(pattern.findall(template.source), *found))
    pairs = frozenset(pair for tokens in found for pair in itertools.pairwise(["", *tokens]))
    return ControlOrder(known, frozenset(common), pairs)
