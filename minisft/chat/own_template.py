"""A model's own chat template (Jinja), as segments: which characters of what it renders are whose.

The template renders a whole conversation as text. To label that text exactly, three places must be
known: what came from the messages (it may not become a control token), where each answer begins
(where the template's generation prompt ends), and the token that ends it (where generation stops).

1. The roles of a conversation are rendered once with markers in the place of the contents. The
   text between the markers is the template's own; `add_generation_prompt` shows where each answer
   begins. This layout serves all conversations with these roles.
2. Each conversation is rendered as it is. If this text is the layout, filled with the contents,
   the layout labels it.
3. Otherwise the template changes contents (it removes earlier reasoning, for example): each answer
   then begins where the prompt of its own turn ends, one rendering per answer.

A conversation that the template refuses, or that cannot be labelled exactly, raises
`RefusedConversation`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.chat.answer_spans import is_whole, labelled_by_prompts, shows_reasoning
from minisft.chat.jinja_template import (
    JinjaTemplate,
    Layout,
    Piece,
    control_token,
    cut_at,
    require_characters,
)
from minisft.chat.template import RefusedConversation, Segment
from minisft.chat.template_markers import ControlOrder, control_order, renderings, words_of_template
from minisft.chat.tool_calls import shows_tools
from minisft.data.conversations import Conversation, Message
from minisft.errors import UserError
from minisft.files import read_json
from minisft.text import one_line

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer

MOST_LAYOUTS = 1_000  # role sequences whose layout is kept
SPACE = " \n "  # around a marker: a side without it in the rendering is one that the template strips


@dataclass(frozen=True)
class OwnTemplate(JinjaTemplate):
    """The chat template of a tokenizer of transformers; useful after `fitted_to` only.

    `stops` are the contents of the tokens at which generation stops, the one that ends an answer
    first. `ends` are these and the token after an answer that is not the last.
    """

    name: str = "own"
    stops: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()  # none that the vocabulary lacks
    markers: str = "own"
    opening: tuple[Segment, ...] = ()
    has_tools: bool = False
    has_definitions: bool = False  # whether it shows the definitions of tools as well
    _layouts: dict[tuple[str, ...], Layout | None] = field(default_factory=dict, compare=False, repr=False)
    _latest: list[Any] = field(default_factory=list, compare=False, repr=False)  # a conversation and its labels

    def fitted_to(self, tokenizer: Tokenizer) -> OwnTemplate:
        """The template of `tokenizer`. Raises `UserError` if it has none that can be used."""
        hf = getattr(tokenizer, "hf", None)
        if hf is None:
            raise UserError(f"the tokenizer {tokenizer.name} has no chat template in Jinja: use another --template")
        return template_of(hf)

    @functools.cached_property
    def _order(self) -> ControlOrder:
        return control_order(self, self.has_tools)

    def may_follow(self, before: str, control: str) -> bool:
        """Whether the template may write a control token after another, or after "", the start."""
        return self._order.allows(before, control)

    def marks_and_stops(self, hf: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All control tokens, those that the template writes before a question included; the stops."""
        template = template_of(hf)
        return tuple(template.control), template.stops

    # --- layouts -----------------------------------------------------------------------------------

    def layout(self, roles: tuple[str, ...]) -> Layout | None:
        """The layout of conversations with these roles; None if they have to be labelled one by one.

        Raises `RefusedConversation` if the template refuses these roles.
        """
        if roles not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[roles] = self._new_layout(roles)
        return self._layouts[roles]

    def _new_layout(self, roles: tuple[str, ...]) -> Layout | None:
        markers = [f"m4rk{i}kr4m" for i in range(len(roles))]
        messages = [Message(role, f"{SPACE}{mark}{SPACE}") for role, mark in zip(roles, markers, strict=True)]
        whole = self.render(messages)
        if any(whole.count(mark) != 1 for mark in markers):
            return None
        places = sorted((whole.index(mark), i) for i, mark in enumerate(markers))
        spans: list[tuple[int, int, int, str]] = []  # start and end of a content, message, stripped sides
        for start, i in places:
            end = start + len(markers[i])
            left, right = whole.endswith(SPACE, 0, start), whole.startswith(SPACE, end)
            sides = "" if left else "l", "" if right else "r"
            spans.append((start - len(SPACE) * left, end + len(SPACE) * right, i, "".join(sides)))
        answers: dict[int, tuple[int, int]] = {}
        others = set()
        for number, (start, end, i, _) in enumerate(spans):
            if roles[i] != "assistant":
                continue
            before = spans[number - 1][1] if number else 0
            after = spans[number + 1][0] if number + 1 < len(spans) else len(whole)
            try:
                begin, is_prefix = self._begin(whole, messages[:i], markers[:i], before, start)
                others |= set() if is_prefix else {i}
                stop = self.end_token(whole, end, after).end()
                if whole[before:stop] not in self.render(messages[: i + 1]):
                    raise RefusedConversation("the template changes this answer in later turns")
                answers[i] = begin, stop
            except RefusedConversation:  # this answer cannot be trained where it is
                others.add(i)
        if not answers:
            return None
        return Layout(tuple(cut_at(whole, spans, answers)), frozenset(others))

    def _begin(
        self, whole: str, prompt: Sequence[Message], markers: Sequence[str], before: int, start: int
    ) -> tuple[int, bool]:
        """Where the answer after `prompt` begins in `whole`, and whether `whole` begins with the prompt.

        If it does not, the answer begins where the end of the prompt alone is found after `before`.
        Raises `RefusedConversation` if that is not before its content, at `start`.
        """
        text = self.render(prompt, prompt=True)
        if whole.startswith(text) and before <= len(text) <= start:
            return len(text), True
        last = max((text.rfind(mark) + len(mark) for mark in markers if mark in text), default=0)
        last += len(SPACE) * text.startswith(SPACE, last)
        tail = text[last:]
        if not whole.startswith(tail, before) or before + len(tail) > start:
            raise RefusedConversation("the template's generation prompt is not what it writes before an answer")
        return before + len(tail), False

    # --- labelling ---------------------------------------------------------------------------------

    def labelled(self, conversation: Conversation) -> tuple[list[Piece], frozenset[int]]:
        """The pieces of a conversation's rendering, and the answers to which inference has another prompt.

        Raises `RefusedConversation`.
        """
        if not self._latest or self._latest[0] is not conversation:
            require_characters(conversation.messages, conversation.tools)
            labels = self._labelled_by_layout(conversation)
            labels = labels or self.labelled_by_prompts(conversation.messages, conversation.tools)
            self._latest[:] = [conversation, labels]
        return self._latest[1]

    def _labelled_by_layout(self, conversation: Conversation) -> tuple[list[Piece], frozenset[int]] | None:
        """`labelled` by the layout of the roles; None if the rendering, or a prompt, is another."""
        messages = conversation.messages
        if conversation.tools or any(message.tool for message in messages):
            return None
        layout = self.layout(tuple(message.role for message in messages))
        if layout is None:
            return None
        pieces = layout.filled([message.content for message in messages])
        if "".join(piece.text for piece in pieces) != self.render(messages):
            return None
        return (pieces, layout.others) if self._begins_with_prompts(messages, pieces, layout.others) else None

    def _begins_with_prompts(
        self, messages: Sequence[Message], pieces: Sequence[Piece], others: frozenset[int]
    ) -> bool:
        """Whether the text before each trained answer, without the `others`, is its prompt at inference.

        A template may write the last message in another way than an earlier one, for some contents
        only; the layout does not have these contents.
        """
        before = ""
        seen: set[int | None] = set()
        for piece in pieces:
            i = piece.answer
            begins = i is not None and i not in seen | others and messages[i].trained
            if begins and before != self.render(messages[:i], prompt=True):
                return False
            seen |= {i}
            before += piece.text
        return True

    def labelled_by_prompts(self, messages: Sequence[Message], tools: str = "") -> tuple[list[Piece], frozenset[int]]:
        """`labelled` without a layout; see `answer_spans`. Raises `RefusedConversation`."""
        return labelled_by_prompts(self, messages, tools)

    # --- the interface of a chat template ----------------------------------------------------------

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The segments of a whole conversation. Raises `RefusedConversation` at once."""
        pieces, _ = self.labelled(conversation)
        return self._segments(pieces, conversation.messages)

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """The template's own generation prompt for the last answer."""
        messages = self.hidden(conversation.messages[:-1])
        turn = sum(message.role == "assistant" for message in messages)
        pieces = [Piece(self.render_safely(messages, prompt=True, tools=self.hide_json(conversation.tools)))]
        return [*self._segments(pieces, conversation.messages, turn)]

    def normalized(self, messages: tuple[Message, ...]) -> list[Message]:
        """The messages as they are: the template decides."""
        return list(messages)

    def trained_text(self, answer: str) -> str:
        """The answer without the white space around it, which the template may add or strip."""
        return answer.strip()

    def leaves_out(self, conversation: Conversation) -> list[str]:
        """What the template does not write of the answers, not even at their own turn, or of the tools.

        An answer of which a part is left out is not trained.
        """
        messages, reasons = conversation.messages, []
        if conversation.tools and not self.has_definitions:
            reasons.append(f"definitions of tools left out: the template {self.name} has no place for them")
        if any(m.reasoning for m in messages) and not shows_reasoning(
            messages, self.render(messages, tools=conversation.tools)
        ):
            reasons.append(f"reasoning left out: the template {self.name} has no place for it")
        elif self._left_out(conversation):
            reasons.append(f"an answer is not trained: the template {self.name} leaves out a part of it")
        return reasons

    def _left_out(self, conversation: Conversation) -> set[int]:
        """The answers to be trained of which the template leaves out a part at their own turn."""
        messages = conversation.messages
        return {
            i
            for i in self.labelled(conversation)[1]
            if messages[i].trained
            and not is_whole(messages[i], self.render(messages[: i + 1], tools=conversation.tools), False)
        }

    difference = "the template changes earlier turns later"

    def same_at_every_turn(self, conversation: Conversation) -> bool:
        """Whether each trained answer's prompt in training equals the prompt of inference at that turn."""
        others = self.labelled(conversation)[1] - self._left_out(conversation)
        return not any(conversation.messages[i].trained for i in others)

    def jinja(self) -> str:
        """The model's own template."""
        return self.source

    def _segments(self, pieces: Sequence[Piece], messages: Sequence[Message], turn: int = 0) -> Iterator[Segment]:
        """Split pieces at the template's control tokens, and where an answer begins or ends."""
        after = "nothing"
        # An answer that is not trained is encoded together with the text before it, as in a prompt.
        for trained, run in itertools.groupby(
            pieces, key=lambda p: p.answer is not None and messages[p.answer].trained
        ):
            for text, control, answer in self.split(run):
                role = "template" if answer is None else "assistant"
                if control is None:
                    yield Segment(role, turn, trained, text=self.shown(text), after=after)
                    after = "text"
                    continue
                is_end = answer is not None and control in self.ends
                name = "eos" if is_end and control == self.stops[0] else control
                yield Segment(role, turn, trained, control=name, ends=is_end)
                after = "control"
                turn += is_end


def template_of(hf: Any) -> OwnTemplate:
    """The chat template of a tokenizer of transformers.

    Raises `UserError` if it has none, or if it does not end an answer with a control token.
    """
    name = one_line(Path(hf.name_or_path).name)
    try:
        source = hf.get_chat_template()
    except ValueError:
        raise UserError(f"{name} has no chat template of its own: use another --template, such as v1") from None
    stop_ids = _generation_stops(hf)
    tokens = hf.added_tokens_decoder.items()
    control = {
        token.content: control_token(token)
        for token_id, token in tokens
        if (token.special or token_id in stop_ids) and not token.content.isspace()
    }
    stops = tuple(token for token in control if hf.convert_tokens_to_ids(token) in stop_ids)
    template = OwnTemplate(source=source, variables=dict(hf.special_tokens_map), control=control, ends=stops)
    exchange = (Message("user", "qu3stion"), Message("assistant", "4nswer"))
    try:
        # Tokens that are merely added words, but mark a turn in this template.
        written = template.render((*exchange, exchange[0]), prompt=True)
        words = {token.content: token for _, token in tokens}
        marks = words_of_template("".join((written, *renderings(template))), words)
        control |= {word: control_token(words[word]) for word in marks}
        template = replace(template, control=control)
        end = template.end_after(exchange, exchange[1].content)
        stops = (end, *(token for token in stops if token != end))
        template = replace(template, stops=stops, ends=stops)
        with suppress(RefusedConversation):
            earlier = (Message("user", "f1rst"), Message("assistant", "r3ply"))
            middle = template.end_after((*earlier, *exchange), earlier[1].content, exchange[0].content)
            if middle in template.render(exchange).rpartition(exchange[1].content)[2]:  # it ends every answer
                stops = (middle, *(token for token in stops if token != middle))
            template = replace(template, stops=stops, ends=(*stops, middle))
        prompt = template.prompt_segments(Conversation("", exchange))
    except RefusedConversation as reason:
        raise UserError(
            f"the chat template of {name} cannot be used ({reason}): use another --template, such as v1"
        ) from reason
    last = max((i for i, segment in enumerate(prompt) if segment.control), default=len(prompt))
    is_constant = exchange[0].content not in "".join(segment.text or "" for segment in prompt[last:])
    return _with_tools(replace(template, opening=tuple(prompt[last:] if is_constant else ())))


def _with_tools(template: OwnTemplate) -> OwnTemplate:
    """The template with what it shows of tools, and the form of arguments that it takes."""
    for text_arguments in (False, True):
        template = replace(template, text_arguments=text_arguments)
        calls, definitions = shows_tools(template)
        if calls:
            return replace(template, has_tools=True, has_definitions=definitions)
    return template


def _generation_stops(hf: Any) -> set[int]:
    """The ids of EOS, and of the tokens at which the model's `generation_config.json` stops."""
    settings = read_json(Path(hf.name_or_path) / "generation_config.json", dict[str, Any]) or {}
    ids = settings.get("eos_token_id")
    return {hf.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
