"""Jinja chat templates of transformers: what one renders, and which control tokens it writes itself.

A content is untrusted text. While a template renders it, stand-ins replace the control tokens that
it spells, and a template that makes a control token of a text is refused.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minisft.chat.harmless_tools import harmless
from minisft.chat.render_process import render
from minisft.chat.template import RefusedConversation
from minisft.data.conversations import Message
from minisft.data.tools import changed_strings

NO_END = "the template ends an answer without a token at which generation could stop"
# Around the number of a control token that a content spells, while the template is rendered.
HIDING = "\ufdd2"  # a noncharacter of Unicode: no text has it
_HIDDEN = re.compile(f"{HIDING}(\\d+){HIDING}")


@dataclass(frozen=True)
class ControlToken:
    """A control token that template text may contain; some absorb the white space beside them."""

    content: str
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True)
class Piece:
    """A part of a rendering: text of the template, or a message's content (`message` is its index).

    `answer` is the index of the answer that the piece is trained for, or None.
    """

    text: str
    message: int | None = None
    answer: int | None = None


@dataclass(frozen=True)
class Layout:
    """What the template writes around the contents of conversations with the same roles.

    `pieces` with a `message` have the text `l`, `r`, both or neither: the sides that are stripped.
    `others` are the answers whose prompt at inference is not the beginning of the whole rendering.
    """

    pieces: tuple[Piece, ...]
    others: frozenset[int]

    def filled(self, contents: Sequence[str]) -> list[Piece]:
        """The pieces with the contents of a conversation."""
        filled = []
        for piece in self.pieces:
            if piece.message is not None:
                content = contents[piece.message]
                content = content.lstrip() if "l" in piece.text else content
                content = content.rstrip() if "r" in piece.text else content
                piece = Piece(content, piece.message, piece.answer)
            filled.append(piece)
        return filled


@dataclass(frozen=True)
class JinjaTemplate:
    """A template's `source`, and the special tokens that it may use, `variables`.

    `control` are the control tokens by content, and `ends` those that may end an answer.
    `text_arguments`: see `as_chat`.
    """

    source: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, ControlToken] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    text_arguments: bool = False

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: str = "") -> str:
        """The text of messages, with a generation prompt if `prompt`.

        `tools` are definitions of tools as JSON text. Raises `RefusedConversation`: see
        `render_process.render`.
        """
        request = {
            "messages": as_chat(messages, self.text_arguments),
            "tools": json.loads(tools) if tools else None,
            "add_generation_prompt": prompt,
        }
        return render({"source": self.source, "variables": self.variables}, request)

    def end_after(self, messages: Sequence[Message], content: str, following: str = "") -> str:
        """The token that ends the answer with this content, before the `following` message's.

        Raises `RefusedConversation`.
        """
        text = self.render(messages)
        if text.count(content) != 1:
            raise RefusedConversation("it does not write an answer as it is, once")
        begin, end = text.index(content), text.find(following) if following else len(text)
        found = [match[0] for match in self.control_pattern.finditer(text, begin, end)]
        known = [token for token in found if token in self.ends]
        # The last token before a content opens a turn: alone, it is no end of the turn before.
        others = found[:-1] if following else found
        if not known and not others:
            raise RefusedConversation(NO_END)
        return (known or others)[0]

    def end_token(self, text: str, begin: int, end: int) -> re.Match[str]:
        """The token in `text` that ends an answer, whose content ends at `begin`.

        Raises `RefusedConversation` if there is none before `end`.
        """
        found = self.control_pattern.finditer(text, begin, end)
        stop = next((match for match in found if match[0] in self.ends), None)
        if stop is None:
            raise RefusedConversation(NO_END)
        return stop

    @property
    def control_pattern(self) -> re.Pattern[str]:
        return _pattern(tuple(self.control))

    def hidden(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with stand-ins for the control tokens that they spell.

        Raises `RefusedConversation` if a stand-in could not be told from a text.
        """
        require_characters(messages)
        return [
            replace(m, content=self.hide(m.content), reasoning=self.hide(m.reasoning), tool=self.hide_json(m.tool))
            for m in messages
        ]

    def hide(self, text: str) -> str:
        """A text with stand-ins for the control tokens that it spells."""
        names = list(self.control)
        return self.control_pattern.sub(lambda match: f"{HIDING}{names.index(match[0])}{HIDING}", text)

    def hide_json(self, text: str) -> str:
        """JSON text with stand-ins for the control tokens that its strings spell."""
        return changed_strings(text, self.hide)

    def render_safely(self, hidden: Sequence[Message], prompt: bool = False, tools: str = "") -> str:
        """The text of messages whose control tokens are all the template's own.

        A template that deletes, joins or lowers parts of a text, or joins its own text to a key, may
        make a control token; then it has others than around harmless texts. Raises `RefusedConversation`.
        """
        text = self.render(hidden, prompt, tools)
        names: dict[str, str] = {}
        plain = [
            replace(m, content=f"m4rk{i}kr4m", reasoning=m.reasoning and f"th0ught{i}", tool=harmless(m.tool, names))
            for i, m in enumerate(hidden)
        ]
        of_plain = self.render(plain, prompt, harmless(tools, names))
        if self.control_pattern.findall(text) != self.control_pattern.findall(of_plain):
            raise RefusedConversation("the template makes a control token of a text, or leaves one out for it")
        return text

    def shown(self, text: str) -> str:
        """Text of a piece with the control tokens that its content spells."""
        names = list(self.control)
        return _HIDDEN.sub(lambda match: names[int(match[1])], text)

    def split(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, str | None, int | None]]:
        """Yield (text, None, answer) and ("", control token, answer) of adjacent pieces.

        Only text of the template has control tokens, contents have none.
        """
        answer: int | None = None
        text = ""
        strips = False  # whether the control token before absorbs white space
        for piece in pieces:
            cursor, answer = 0, piece.answer
            matches = self.control_pattern.finditer(piece.text) if piece.message is None else ()
            for match in matches:
                token = self.control[match[0]]
                text += piece.text[cursor : match.start()]
                text = text.lstrip() if strips else text
                text = text.rstrip() if token.lstrip else text
                if text:
                    yield text, None, answer
                yield "", token.content, answer
                text, strips, cursor = "", token.rstrip, match.end()
            text += piece.text[cursor:]
        text = text.lstrip() if strips else text
        if text:
            yield text, None, answer


def cut_at(
    whole: str, spans: Sequence[tuple[int, int, int, str]], answers: Mapping[int, tuple[int, int]]
) -> Iterator[Piece]:
    """Cut a rendering of markers at its contents and at the ends of its answers."""
    answer_of = {(begin, stop): i for i, (begin, stop) in answers.items()}

    def template_text(begin: int, end: int) -> Iterator[Piece]:
        cuts = sorted({begin, end, *(cut for span in answer_of for cut in span if begin < cut < end)})
        for start, stop in itertools.pairwise(cuts):
            inside = (i for (first, last), i in answer_of.items() if first <= start and stop <= last)
            yield Piece(whole[start:stop], answer=next(inside, None))

    cursor = 0
    for start, end, i, sides in spans:
        yield from template_text(cursor, start)
        yield Piece(sides, i, i if i in answers else None)
        cursor = end
    yield from template_text(cursor, len(whole))


def as_chat(messages: Iterable[Message], text_arguments: bool = False) -> list[dict[str, Any]]:
    """Messages as transformers' chat templates read them.

    The arguments of a tool call are an object, or with `text_arguments` its JSON, which is the form
    that DeepSeek's templates take.
    """
    chat = [
        {"role": m.role, "content": m.content}
        | ({"reasoning_content": m.reasoning} if m.reasoning else {})
        | (json.loads(m.tool) if m.tool else {})
        for m in messages
    ]
    for function in (call["function"] for turn in chat for call in turn.get("tool_calls", ()) if text_arguments):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return chat


def require_characters(messages: Sequence[Message], tools: str = "") -> None:
    """Raise `RefusedConversation` for a text with the noncharacter that stand-ins are made of."""
    texts = (text for message in messages for text in (message.content, message.reasoning, message.tool))
    if HIDING in tools or any(HIDING in text for text in texts):
        raise RefusedConversation("a text has U+FDD2, which is no character")


def control_token(token: Any) -> ControlToken:
    return ControlToken(token.content, token.lstrip, token.rstrip)


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of the control tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
